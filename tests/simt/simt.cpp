#include "simt.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <vector>

namespace simt {
namespace {

constexpr size_t STACK = 256 << 10;
const Kernel *kernels = nullptr;

struct Copy {
    unsigned char *to;
    const unsigned char *from;
    uint32_t bytes;
    uint64_t group;
};

struct Fiber {
    void *stack_pointer;
    unsigned char *stack;
    // Copies under way, oldest first.
    std::vector<Copy> copies;
    uint64_t groups;
};

struct Warp {
    // Lanes that can go on, and lanes that wait in a collective.
    uint32_t ready, waiting;
    void (*work)(void *const (&)[32]);
    void *operands[32];
};

struct Block {
    const Kernel *kernel;
    const void *params;
    Grid grid;
    uint32_t index;
    Order order;
    uint64_t random;
    unsigned char *shared;
    uint32_t running, at_barrier;
    // The vote at the barrier that threads gather at, and at the last one.
    bool vote, last_vote;
    Warp warps[32];
    Fiber fibers[1024];
    Fiber scheduler;
    const void *scheduler_stack;
    size_t scheduler_stack_bytes;
    uint32_t current;
} block;

#if defined(__x86_64__)

extern "C" void simt_switch(void **save, void *load);
// Callee-saved registers go to the old stack and come from the new one.
asm(R"(
    .text
    .globl simt_switch
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// A stack that simt_switch enters `entry` with.
void *fresh_stack(unsigned char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + STACK);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}

#else
#error "the fiber switch is written for x86-64"
#endif

uint64_t next_random() {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return block.random;
}

// The thread whose turn it is.
bool choose(uint32_t &thread) {
    const uint32_t warps = block.grid.threads / 32;
    const uint32_t start = block.order >= 2 ? next_random() % warps : 0;
    for (uint32_t i = 0; i < warps; i++) {
        const uint32_t w = block.order == 1 ? warps - 1 - i : (start + i) % warps;
        const uint32_t ready = block.warps[w].ready;
        if (!ready) continue;
        uint32_t lane = __builtin_ctz(ready);
        if (block.order == 1) lane = 31 - __builtin_clz(ready);
        if (block.order >= 2) {
            const uint32_t turn = next_random() % 32;
            const uint32_t turned = ready >> turn | (uint64_t)ready << (32 - turn);
            lane = (__builtin_ctz(turned) + turn) % 32;
        }
        thread = 32 * w + lane;
        return true;
    }
    return false;
}

void set_ready(uint32_t thread, bool ready) {
    uint32_t &lanes = block.warps[thread / 32].ready;
    lanes = ready ? lanes | 1u << thread % 32 : lanes & ~(1u << thread % 32);
}

// Leaves the current fiber, which can no longer go on, for another.
void give_way(bool ended) {
    Fiber &from = block.fibers[block.current];
    uint32_t thread;
    if (choose(thread)) {
        block.current = thread;
        void *fake;
        __sanitizer_start_switch_fiber(ended ? nullptr : &fake, block.fibers[thread].stack, STACK);
        simt_switch(&from.stack_pointer, block.fibers[thread].stack_pointer);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
        return;
    }
    if (block.running > 0) fail("the threads that are left wait for ones that do not come");
    __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack, block.scheduler_stack_bytes);
    simt_switch(&from.stack_pointer, block.scheduler.stack_pointer);
}

void fiber_main() {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!block.scheduler_stack) {
        block.scheduler_stack = bottom;
        block.scheduler_stack_bytes = bytes;
    }
    block.kernel->run(block.params);
    if (block.at_barrier > 0) fail("a thread ended while others wait at a barrier");
    block.running--;
    set_ready(block.current, false);
    give_way(true);
}

void run_block() {
    for (uint32_t i = 0; i < block.grid.threads; i++) {
        Fiber &fiber = block.fibers[i];
        if (!fiber.stack) {
            void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) fail("no memory for stacks");
            fiber.stack = static_cast<unsigned char *>(stack);
        }
        // The frames in which the last thread here ended were never left.
        __asan_unpoison_memory_region(fiber.stack + STACK - 4096, 4096);
        fiber.stack_pointer = fresh_stack(fiber.stack, fiber_main);
        fiber.copies.clear();
        fiber.groups = 0;
    }
    for (uint32_t w = 0; w < block.grid.threads / 32; w++) block.warps[w] = {~0u, 0, nullptr, {}};
    block.running = block.grid.threads;
    block.at_barrier = 0;
    block.vote = false;
    block.scheduler_stack = nullptr;
    choose(block.current);
    const Fiber &first = block.fibers[block.current];
    void *fake;
    __sanitizer_start_switch_fiber(&fake, first.stack, STACK);
    simt_switch(&block.scheduler.stack_pointer, first.stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

} // namespace

Kernel::Kernel(const char *name, uint32_t threads, size_t param_bytes, void (*run)(const void *))
    : name(name), threads(threads), param_bytes(param_bytes), run(run), next(kernels) {
    kernels = this;
}

const Kernel *Kernel::first() { return kernels; }

const Kernel *Kernel::find(const char *name) {
    for (const Kernel *k = kernels; k; k = k->next) {
        if (strcmp(k->name, name) == 0) return k;
    }
    return nullptr;
}

void launch(const Kernel &kernel, const Grid &grid, const void *params, Order order) {
    if (grid.threads != kernel.threads) fail("the block is not what the kernel was compiled for");
    block.kernel = &kernel;
    block.params = params;
    block.grid = grid;
    block.order = order;
    block.random = order * 0x9e3779b97f4a7c15 + 1;
    for (uint32_t i = 0; i < grid.blocks; i++) {
        block.index = order == 1 ? grid.blocks - 1 - i : i;
        // Of its own for each block, so that the sanitizer sees where it ends.
        void *shared = nullptr;
        if (posix_memalign(&shared, 128, grid.shared_bytes ? grid.shared_bytes : 1)) {
            fail("no shared memory");
        }
        memset(shared, 0xff, grid.shared_bytes);
        block.shared = static_cast<unsigned char *>(shared);
        run_block();
        free(shared);
    }
}

uint32_t thread_index() { return block.current; }
uint32_t block_index() { return block.index; }
uint32_t block_count() { return block.grid.blocks; }
unsigned char *shared_memory() { return block.shared; }

void sync_block() {
    if (block.running < block.grid.threads) fail("a barrier after a thread has ended");
    if (++block.at_barrier == block.grid.threads) {
        block.at_barrier = 0;
        block.last_vote = block.vote;
        block.vote = false;
        for (uint32_t w = 0; w < block.grid.threads / 32; w++) block.warps[w].ready = ~0u;
        return;
    }
    set_ready(block.current, false);
    give_way(false);
}

bool any_in_block(bool x) {
    block.vote |= x;
    sync_block();
    return block.last_vote;
}

void meet(void *own, void (*work)(void *const (&)[32])) {
    Warp &warp = block.warps[block.current / 32];
    const uint32_t lane = block.current % 32;
    if (warp.waiting && warp.work != work) fail("lanes of a warp meet in different operations");
    warp.work = work;
    warp.operands[lane] = own;
    warp.waiting |= 1u << lane;
    if (warp.waiting == ~0u) {
        warp.waiting = 0;
        warp.ready = ~0u;
        work(warp.operands);
        return;
    }
    set_ready(block.current, false);
    give_way(false);
}

void check_shared(const unsigned char *p, size_t bytes) {
    if (p < block.shared || p + bytes > block.shared + block.grid.shared_bytes) {
        fail("an address outside shared memory where shared memory is needed");
    }
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a misaligned address in shared memory");
}

void copy_async(unsigned char *shared, const unsigned char *global, uint32_t bytes) {
    check_shared(shared, 16);
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("a misaligned source of a copy");
    if (bytes > 16) fail("a copy of more than sixteen bytes");
    Fiber &fiber = block.fibers[block.current];
    memset(shared, 0xff, 16);
    fiber.copies.push_back({shared, global, bytes, fiber.groups});
}

void copy_commit() { block.fibers[block.current].groups++; }

void copy_wait(uint32_t groups) {
    Fiber &fiber = block.fibers[block.current];
    size_t done = 0;
    for (const Copy &copy : fiber.copies) {
        if (copy.group + groups >= fiber.groups) break;
        memcpy(copy.to, copy.from, copy.bytes);
        memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
        done++;
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
}

void fail(const char *why) {
    fprintf(stderr, "simt: %s: block %u, thread %u of %s\n", why, block.index, block.current,
            block.kernel ? block.kernel->name : "none");
    _exit(3);
}

} // namespace simt
