// A block of threads on one host thread: each is a fiber that runs until it must wait for others.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

// A __global__ function; they register themselves.
struct Kernel {
    const char *name;
    uint32_t threads;
    size_t param_bytes;
    void (*run)(const void *params);
    const Kernel *next;

    Kernel(const char *name, uint32_t threads, size_t param_bytes, void (*run)(const void *));
    static const Kernel *first();
    static const Kernel *find(const char *name);
};

// How threads take turns: the lowest that can go on, the highest, or (from 2 on) a random one.
using Order = uint64_t;

struct Grid {
    uint32_t blocks, threads, shared_bytes;
};

// Runs all blocks; ends the process with a message where a device would hang or misbehave.
void launch(const Kernel &kernel, const Grid &grid, const void *params, Order order);

uint32_t thread_index();
uint32_t block_index();
uint32_t block_count();
unsigned char *shared_memory();
void sync_block();
bool any_in_block(bool x);

// A warp's collective: waits for all 32 lanes; the last to come does the work of all.
void meet(void *own, void (*work)(void *const (&lanes)[32]));

struct Fragments {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};
void mma(void *const (&lanes)[32]);

// Ends the process unless these bytes are shared memory, aligned to their number.
void check_shared(const unsigned char *p, size_t bytes);

// As late as allowed: the wait that covers a copy makes it. Until then the destination is NaN.
void copy_async(unsigned char *shared, const unsigned char *global, uint32_t bytes);
void copy_commit();
void copy_wait(uint32_t groups);

[[noreturn]] void fail(const char *why);

} // namespace simt
