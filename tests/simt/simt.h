// The threads of a cluster of blocks on one host thread: each is a fiber that runs until it must wait
// for others.
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
    uint32_t blocks, cluster, threads, shared_bytes;
};

// A multiple of 64 bytes from one on.
struct Memory {
    unsigned char *start;
    size_t bytes;
};

// Runs all blocks, the clusters one after the other; ends the process with a message where a device
// would hang or misbehave. The kernel before may still write to the callers' memory: a thread that has
// not waited for its end may not touch it.
void launch(const Kernel &kernel, const Grid &grid, const void *params, Order order,
            const Memory &callers);
void wait_for_the_one_before();

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

// ---- Devices of compute capability 9.0 ----

uint32_t cluster_rank();
uint32_t cluster_size();
void sync_cluster();

// 128 threads from a multiple of 128 on; what any of them says.
bool sync_group(uint32_t group, bool x);

// Barriers in shared memory. Waiting makes the copies and stores that count for a barrier, all at once
// and not before: until then their destinations are NaN.
void barrier_init(uint64_t *barrier, uint32_t arrivals);
void barrier_expect(uint64_t *barrier, uint32_t bytes);
void barrier_arrive(uint64_t *barrier, uint32_t rank);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void copy_bulk(unsigned char *shared, const unsigned char *global, uint32_t bytes,
               uint64_t *barrier, uint32_t rank);
void store_in_block(void *shared, const void *from, uint32_t bytes, uint64_t *barrier,
                    uint32_t rank);

// From where the block's shared memory starts.
uint64_t shared_offset(const unsigned char *shared);

// One lane's operands of a product of a warpgroup: tiles · 4 accumulators, four registers of A, and
// where B lies.
struct Product {
    float *c;
    const uint32_t *a;
    uint64_t b;
    uint32_t tiles;
    bool transposed;
};

// As late as allowed: `products_end` computes them. Until then accumulators are NaN.
void products_begin();
void products(const Product &product);
void products_end();
// B of one product, [8 · tiles][16] bf16 numbers as they lie in shared memory.
void multiply(const Product *(&lanes)[32], const uint16_t *b);

[[noreturn]] void fail(const char *why);

} // namespace simt
