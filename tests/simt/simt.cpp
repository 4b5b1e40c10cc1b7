#include "simt.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr size_t STACK = 256 << 10;
const Kernel *kernels = nullptr;

// Of a thread's own copies.
struct Copy {
    unsigned char *to;
    const unsigned char *from;
    uint32_t bytes;
    uint64_t group;
};

struct Fiber {
    void *stack_pointer;
    unsigned char *stack;
    // For the kernel before.
    bool has_waited;
    // Copies under way, oldest first.
    std::vector<Copy> copies;
    uint64_t groups;
    // Products under way, and what their accumulators were before.
    bool multiplies;
    std::vector<Product> products;
    std::map<float *, std::vector<float>> accumulators;
};

struct Warp {
    // Lanes that can go on, and lanes that wait in a collective.
    uint32_t ready, waiting;
    void (*work)(void *const (&)[32]);
    void *operands[32];
};

// Threads that gather, and their vote and the last one.
struct Meeting {
    uint32_t arrived;
    bool vote, last_vote;

    // Whether this thread is the last of `all`.
    bool arrive(uint32_t all, bool x) {
        vote |= x;
        if (++arrived < all) return false;
        arrived = 0;
        last_vote = vote;
        vote = false;
        return true;
    }
};

struct Block {
    uint32_t index;
    unsigned char *shared;
    uint32_t running;
    // One of its threads, for the kernel before.
    bool has_waited;
    Meeting all, groups[8];
    Warp warps[32];
    Fiber fibers[1024];
};

// What is on its way to shared memory and counts for a barrier.
struct Delivery {
    unsigned char *to;
    const unsigned char *from;
    std::vector<unsigned char> stored;
    uint32_t bytes;
};

struct Barrier {
    uint32_t arrivals, pending;
    uint64_t phase;
    // Announced and not yet on their way.
    int64_t bytes;
    std::vector<Delivery> deliveries;
    // Threads that wait, by block and thread.
    std::vector<std::pair<uint32_t, uint32_t>> waiting;
};

constexpr uint32_t CLUSTER_MOST = 8;

struct Cluster {
    const Kernel *kernel;
    const void *params;
    Grid grid;
    Order order;
    uint64_t random;
    Memory callers;
    bool callers_are_open;
    // What the sanitizer knows of them: a byte of eight, where they are open.
    std::vector<uint64_t> shadow;
    Meeting all;
    std::map<unsigned char *, Barrier> barriers;
    Block blocks[CLUSTER_MOST];
    Fiber scheduler;
    const void *scheduler_stack;
    size_t scheduler_stack_bytes;
    // The block and the thread whose turn it is.
    uint32_t rank, thread;
} cluster;

Block &own_block() { return cluster.blocks[cluster.rank]; }
Fiber &own_fiber() { return own_block().fibers[cluster.thread]; }

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
    cluster.random ^= cluster.random << 13;
    cluster.random ^= cluster.random >> 7;
    cluster.random ^= cluster.random << 17;
    return cluster.random;
}

// One of n, by the order of threads: the i-th that is asked, from a start on.
uint32_t turn(uint32_t n, uint32_t start, uint32_t i) {
    return cluster.order == 1 ? n - 1 - i : (start + i) % n;
}

// The thread whose turn it is.
bool choose(uint32_t &rank, uint32_t &thread) {
    const bool at_random = cluster.order >= 2;
    const uint32_t blocks = cluster.grid.cluster, warps = cluster.grid.threads / 32;
    const uint32_t first_block = at_random ? next_random() % blocks : 0;
    const uint32_t first_warp = at_random ? next_random() % warps : 0;
    for (uint32_t i = 0; i < blocks * warps; i++) {
        rank = turn(blocks, first_block, i / warps);
        const uint32_t w = turn(warps, first_warp, i % warps);
        const uint32_t ready = cluster.blocks[rank].warps[w].ready;
        if (!ready) continue;
        uint32_t lane = __builtin_ctz(ready);
        if (cluster.order == 1) lane = 31 - __builtin_clz(ready);
        if (at_random) {
            const uint32_t turn = next_random() % 32;
            const uint32_t turned = ready >> turn | (uint64_t)ready << (32 - turn);
            lane = (__builtin_ctz(turned) + turn) % 32;
        }
        thread = 32 * w + lane;
        return true;
    }
    return false;
}

void set_ready(uint32_t rank, uint32_t thread, bool ready) {
    uint32_t &lanes = cluster.blocks[rank].warps[thread / 32].ready;
    lanes = ready ? lanes | 1u << thread % 32 : lanes & ~(1u << thread % 32);
}

void set_warps_ready(uint32_t rank, uint32_t first, uint32_t behind) {
    for (uint32_t w = first; w < behind; w++) cluster.blocks[rank].warps[w].ready = ~0u;
}

uint64_t *shadow_of(const unsigned char *p) {
    size_t scale, offset;
    __asan_get_shadow_mapping(&scale, &offset);
    return reinterpret_cast<uint64_t *>((reinterpret_cast<size_t>(p) >> scale) + offset);
}

// Word by word: memcpy would ask the sanitizer about its own memory.
__attribute__((no_sanitize("address"))) void copy_words(uint64_t *to, const uint64_t *from,
                                                         size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}

// The callers' memory is open to the thread whose turn it is, or is not.
void open_callers(bool open) {
    if (open == cluster.callers_are_open) return;
    cluster.callers_are_open = open;
    const Memory &memory = cluster.callers;
    if (open) copy_words(shadow_of(memory.start), cluster.shadow.data(), cluster.shadow.size());
    else __asan_poison_memory_region(memory.start, memory.bytes);
}

// Leaves the current fiber, which can no longer go on, for another.
void give_way(bool ended) {
    Fiber &from = own_fiber();
    set_ready(cluster.rank, cluster.thread, false);
    uint32_t rank, thread;
    if (choose(rank, thread)) {
        cluster.rank = rank;
        cluster.thread = thread;
        const Fiber &next = own_fiber();
        open_callers(next.has_waited);
        void *fake;
        __sanitizer_start_switch_fiber(ended ? nullptr : &fake, next.stack, STACK);
        simt_switch(&from.stack_pointer, next.stack_pointer);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
        return;
    }
    for (uint32_t i = 0; i < cluster.grid.cluster; i++) {
        if (cluster.blocks[i].running > 0) {
            fail("the threads that are left wait for ones that do not come");
        }
    }
    __sanitizer_start_switch_fiber(nullptr, cluster.scheduler_stack,
                                   cluster.scheduler_stack_bytes);
    simt_switch(&from.stack_pointer, cluster.scheduler.stack_pointer);
}

void fiber_main() {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!cluster.scheduler_stack) {
        cluster.scheduler_stack = bottom;
        cluster.scheduler_stack_bytes = bytes;
    }
    cluster.kernel->run(cluster.params);
    if (own_block().all.arrived > 0 || cluster.all.arrived > 0) {
        fail("a thread ended while others wait at a barrier");
    }
    if (--own_block().running == 0 && !own_block().has_waited) {
        fail("a block ended that did not wait for the kernel before");
    }
    give_way(true);
}

void prepare(Block &own, uint32_t index, bool closed) {
    const Grid &grid = cluster.grid;
    own.index = index;
    own.running = grid.threads;
    own.has_waited = !closed;
    own.all = {};
    for (Meeting &group : own.groups) group = {};
    for (uint32_t w = 0; w < grid.threads / 32; w++) own.warps[w] = {~0u, 0, nullptr, {}};
    // Of its own for each block, so that the sanitizer sees where it ends.
    void *shared = nullptr;
    if (posix_memalign(&shared, 1024, grid.shared_bytes ? grid.shared_bytes : 1)) {
        fail("no shared memory");
    }
    memset(shared, 0xff, grid.shared_bytes);
    own.shared = static_cast<unsigned char *>(shared);
    for (uint32_t i = 0; i < grid.threads; i++) {
        Fiber &fiber = own.fibers[i];
        if (!fiber.stack) {
            void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) fail("no memory for stacks");
            fiber.stack = static_cast<unsigned char *>(stack);
        }
        // The frames in which the last thread here ended were never left.
        __asan_unpoison_memory_region(fiber.stack + STACK - 4096, 4096);
        fiber.stack_pointer = fresh_stack(fiber.stack, fiber_main);
        fiber.has_waited = !closed;
        fiber.copies.clear();
        fiber.groups = 0;
        fiber.multiplies = false;
        fiber.products.clear();
        fiber.accumulators.clear();
    }
}

// While the kernel before is still running (`closed`), or after it.
void run_cluster(uint32_t first_block, bool closed) {
    for (uint32_t i = 0; i < cluster.grid.cluster; i++) {
        prepare(cluster.blocks[i], first_block + i, closed);
    }
    cluster.all = {};
    cluster.barriers.clear();
    cluster.scheduler_stack = nullptr;
    choose(cluster.rank, cluster.thread);
    const Fiber &first = own_fiber();
    open_callers(!closed);
    void *fake;
    __sanitizer_start_switch_fiber(&fake, first.stack, STACK);
    simt_switch(&cluster.scheduler.stack_pointer, first.stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    for (const auto &barrier : cluster.barriers) {
        if (!barrier.second.deliveries.empty()) fail("a copy for which nobody waited");
    }
    for (uint32_t i = 0; i < cluster.grid.cluster; i++) free(cluster.blocks[i].shared);
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

void launch(const Kernel &kernel, const Grid &grid, const void *params, Order order,
            const Memory &callers) {
    if (grid.threads != kernel.threads) fail("the block is not what the kernel was compiled for");
    if (grid.cluster == 0 || grid.cluster > CLUSTER_MOST || grid.blocks % grid.cluster != 0) {
        fail("the grid is not one of whole clusters");
    }
    cluster.kernel = &kernel;
    cluster.params = params;
    cluster.grid = grid;
    cluster.order = order;
    cluster.callers = callers;
    cluster.callers_are_open = true;
    cluster.shadow.resize(callers.bytes / 64);
    copy_words(cluster.shadow.data(), shadow_of(callers.start), cluster.shadow.size());
    cluster.random = order * 0x9e3779b97f4a7c15 + 1;
    for (uint32_t i = 0; i < grid.blocks; i += grid.cluster) {
        // One is enough to tell, and what tells takes time.
        run_cluster(order == 1 ? grid.blocks - grid.cluster - i : i, i == 0);
    }
    open_callers(true);
}

void wait_for_the_one_before() {
    own_fiber().has_waited = own_block().has_waited = true;
    open_callers(true);
}

uint32_t thread_index() { return cluster.thread; }
uint32_t block_index() { return own_block().index; }
uint32_t block_count() { return cluster.grid.blocks; }
unsigned char *shared_memory() { return own_block().shared; }

bool any_in_block(bool x) {
    Block &own = own_block();
    if (own.running < cluster.grid.threads) fail("a barrier after a thread has ended");
    if (own.all.arrive(cluster.grid.threads, x)) {
        set_warps_ready(cluster.rank, 0, cluster.grid.threads / 32);
    } else {
        give_way(false);
    }
    return own.all.last_vote;
}

void sync_block() { any_in_block(false); }

void meet(void *own, void (*work)(void *const (&)[32])) {
    Warp &warp = own_block().warps[cluster.thread / 32];
    const uint32_t lane = cluster.thread % 32;
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
    give_way(false);
}

uint64_t shared_offset(const unsigned char *shared) { return shared - own_block().shared; }

void check_shared(const unsigned char *p, size_t bytes) {
    const Block &own = own_block();
    if (p < own.shared || p + bytes > own.shared + cluster.grid.shared_bytes) {
        fail("an address outside shared memory where shared memory is needed");
    }
    if (reinterpret_cast<uintptr_t>(p) % (bytes < 16 ? bytes : 16)) {
        fail("a misaligned address in shared memory");
    }
}

namespace {

// A copy reads late, but may do so from now on.
void check_source(const unsigned char *global, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("a misaligned source of a copy");
    if (own_fiber().has_waited) return;
    if (__asan_region_is_poisoned(const_cast<unsigned char *>(global), bytes)) {
        fail("a copy of what the kernel before may still write");
    }
}

} // namespace

void copy_async(unsigned char *shared, const unsigned char *global, uint32_t bytes) {
    check_shared(shared, 16);
    check_source(global, bytes);
    if (bytes > 16) fail("a copy of more than sixteen bytes");
    Fiber &fiber = own_fiber();
    memset(shared, 0xff, 16);
    fiber.copies.push_back({shared, global, bytes, fiber.groups});
}

void copy_commit() { own_fiber().groups++; }

void copy_wait(uint32_t groups) {
    Fiber &fiber = own_fiber();
    size_t done = 0;
    for (const Copy &copy : fiber.copies) {
        if (copy.group + groups >= fiber.groups) break;
        memcpy(copy.to, copy.from, copy.bytes);
        memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
        done++;
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
}

// ---- Devices of compute capability 9.0 ----------------------------------------------------------

namespace {

// The same place in another block, which is still there.
unsigned char *in_block(const void *shared, size_t bytes, uint32_t rank) {
    const unsigned char *own = static_cast<const unsigned char *>(shared);
    check_shared(own, bytes);
    if (rank >= cluster.grid.cluster) fail("a block that the cluster does not have");
    if (cluster.blocks[rank].running == 0) fail("the memory of a block that has ended");
    return cluster.blocks[rank].shared + shared_offset(own);
}

Barrier &barrier_of(unsigned char *at) {
    const auto found = cluster.barriers.find(at);
    if (found == cluster.barriers.end()) fail("a barrier that was not set");
    return found->second;
}

// Whether nothing but what is on its way is missing to the end of the phase; who waits looks again.
void look(Barrier &barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    for (const auto &thread : barrier.waiting) set_ready(thread.first, thread.second, true);
    barrier.waiting.clear();
}

void arrive(Barrier &barrier) {
    if (barrier.pending == 0) fail("more arrivals than a barrier expects");
    barrier.pending--;
    look(barrier);
}

void deliver(void *shared, Delivery delivery, uint64_t *barrier, uint32_t rank) {
    delivery.to = in_block(shared, delivery.bytes, rank);
    Barrier &at = barrier_of(in_block(barrier, sizeof *barrier, rank));
    memset(delivery.to, 0xff, delivery.bytes);
    at.deliveries.push_back(delivery);
    at.bytes -= delivery.bytes;
    look(at);
}

// All that is on its way arrives, if the phase ends with it.
void end_phase(Barrier &barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    for (const Delivery &delivery : barrier.deliveries) {
        const void *from = delivery.from ? delivery.from : delivery.stored.data();
        memcpy(delivery.to, from, delivery.bytes);
    }
    barrier.deliveries.clear();
    barrier.phase++;
    barrier.pending = barrier.arrivals;
}

} // namespace

uint32_t cluster_rank() { return cluster.rank; }
uint32_t cluster_size() { return cluster.grid.cluster; }

void sync_cluster() {
    if (cluster.all.arrive(cluster.grid.cluster * cluster.grid.threads, false)) {
        for (uint32_t i = 0; i < cluster.grid.cluster; i++) {
            set_warps_ready(i, 0, cluster.grid.threads / 32);
        }
    } else {
        give_way(false);
    }
}

bool sync_group(uint32_t group, bool x) {
    if (cluster.thread / 128 != group) fail("a barrier of another group");
    Meeting &own = own_block().groups[group];
    if (own.arrive(128, x)) set_warps_ready(cluster.rank, 4 * group, 4 * group + 4);
    else give_way(false);
    return own.last_vote;
}

void barrier_init(uint64_t *barrier, uint32_t arrivals) {
    cluster.barriers[in_block(barrier, sizeof *barrier, cluster.rank)] = {arrivals, arrivals, 0, 0,
                                                                         {}, {}};
}

void barrier_expect(uint64_t *barrier, uint32_t bytes) {
    Barrier &own = barrier_of(in_block(barrier, sizeof *barrier, cluster.rank));
    own.bytes += bytes;
    arrive(own);
}

void barrier_arrive(uint64_t *barrier, uint32_t rank) {
    arrive(barrier_of(in_block(barrier, sizeof *barrier, rank)));
}

void barrier_wait(uint64_t *barrier, uint32_t parity) {
    Barrier &own = barrier_of(in_block(barrier, sizeof *barrier, cluster.rank));
    for (end_phase(own); own.phase % 2 == parity; end_phase(own)) {
        own.waiting.push_back({cluster.rank, cluster.thread});
        give_way(false);
    }
}

void copy_bulk(unsigned char *shared, const unsigned char *global, uint32_t bytes,
               uint64_t *barrier, uint32_t rank) {
    check_source(global, bytes);
    if (bytes == 0 || bytes % 16) fail("a copy that is not of so many times sixteen bytes");
    deliver(shared, {nullptr, global, {}, bytes}, barrier, rank);
}

void store_in_block(void *shared, const void *from, uint32_t bytes, uint64_t *barrier,
                    uint32_t rank) {
    const unsigned char *first = static_cast<const unsigned char *>(from);
    deliver(shared, {nullptr, nullptr, {first, first + bytes}, bytes}, barrier, rank);
}

void products_begin() { own_fiber().multiplies = true; }

void products(const Product &product) {
    Fiber &fiber = own_fiber();
    if (!fiber.multiplies) fail("a product before the registers are ready");
    std::vector<float> &before = fiber.accumulators[product.c];
    if (before.empty()) {
        before.assign(product.c, product.c + 4 * product.tiles);
        memset(product.c, 0xff, 16 * product.tiles);
    }
    fiber.products.push_back(product);
}

namespace {

// Element k of column n of B, as the device finds it: rows of 128 bytes, eight of them in a kilobyte
// whose sixteen-byte chunks are permuted.
uint16_t element(const Product &product, uint32_t n, uint32_t k) {
    const uint64_t start = (product.b & 0x3fff) << 4, eight = (product.b >> 32 & 0x3fff) << 4;
    if (product.b >> 62 != 1) fail("a layout that the harness does not know");
    const uint32_t row = product.transposed ? k : n, column = product.transposed ? n : k;
    if (start % 1024 >= (product.transposed ? 1 : 128)) fail("rows that do not start at a kilobyte");
    uint64_t at = start + row / 8 * eight + row % 8 * 128 + 2 * column;
    at ^= at >> 3 & 0x70;
    const unsigned char *from = own_block().shared + at;
    check_shared(from, 2);
    uint16_t x;
    memcpy(&x, from, 2);
    return x;
}

} // namespace

void products_end() {
    Fiber &fiber = own_fiber();
    for (auto &before : fiber.accumulators) {
        memcpy(before.first, before.second.data(), 4 * before.second.size());
    }
    fiber.accumulators.clear();
    meet(&fiber.products, [](void *const(&lanes)[32]) {
        const auto of = [&](uint32_t lane) -> const std::vector<Product> & {
            return *static_cast<std::vector<Product> *>(lanes[lane]);
        };
        for (size_t i = 0; i < of(0).size(); i++) {
            const Product &first = of(0)[i];
            const Product *operands[32];
            for (uint32_t lane = 0; lane < 32; lane++) {
                if (of(lane).size() != of(0).size() || of(lane)[i].b != first.b) {
                    fail("lanes of a warp multiply by different rows");
                }
                operands[lane] = &of(lane)[i];
            }
            std::vector<uint16_t> b(8 * 16 * first.tiles);
            for (uint32_t x = 0; x < b.size(); x++) b[x] = element(first, x / 16, x % 16);
            multiply(operands, b.data());
        }
    });
    fiber.products.clear();
    fiber.multiplies = false;
}

void fail(const char *why) {
    fprintf(stderr, "simt: %s: block %u, thread %u of %s\n", why, own_block().index,
            cluster.thread, cluster.kernel ? cluster.kernel->name : "none");
    _exit(3);
}

} // namespace simt
