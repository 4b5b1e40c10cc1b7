// Runs the launches of a job on a copy of its memory, once for each order of threads.
//
//   simt layout          the offsets of every parameter struct
//   simt kernels         the names of all kernels
//   simt run JOB OUT     OUT: the memory after each order, one after the other
//
// A job is a sequence of 64-bit words: address and bytes of the memory; number of orders, orders;
// number of regions, start and bytes of each: the rest of the memory may not be touched; where in
// the memory that of callers begins, behind a plan's; number of launches; of each the name (8
// words), blocks, blocks of a cluster, threads, shared bytes, parameter bytes, parameters (whole
// words). The memory follows.
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

#include "layout.h"
#include "simt.h"

namespace {

struct Reader {
    FILE *file;

    void bytes(void *to, size_t n) {
        if (fread(to, 1, n, file) != n) simt::fail("the job ends too early");
    }
    uint64_t word() {
        uint64_t x;
        bytes(&x, sizeof x);
        return x;
    }
    std::vector<uint64_t> words(size_t n) {
        std::vector<uint64_t> x(n);
        bytes(x.data(), 8 * n);
        return x;
    }
};

struct Launch {
    const simt::Kernel *kernel;
    simt::Grid grid;
    std::vector<uint64_t> params;
};

Launch read_launch(Reader &job) {
    char name[65] = {};
    job.bytes(name, 64);
    Launch launch;
    launch.kernel = simt::Kernel::find(name);
    if (!launch.kernel) simt::fail("a kernel that was not compiled");
    launch.grid.blocks = job.word();
    launch.grid.cluster = job.word();
    launch.grid.threads = job.word();
    launch.grid.shared_bytes = job.word();
    const uint64_t bytes = job.word();
    if (bytes != launch.kernel->param_bytes) simt::fail("parameters of another size");
    launch.params = job.words((bytes + 7) / 8);
    return launch;
}

int run(const char *job_path, const char *out_path) {
    Reader job = {fopen(job_path, "rb")};
    FILE *out = fopen(out_path, "wb");
    if (!job.file || !out) simt::fail("cannot open the job or its output");
    const uint64_t address = job.word(), bytes = job.word();
    const std::vector<uint64_t> orders = job.words(job.word());
    const std::vector<uint64_t> regions = job.words(2 * job.word());
    const uint64_t callers = job.word();
    std::vector<Launch> launches(job.word());
    for (Launch &launch : launches) launch = read_launch(job);
    std::vector<unsigned char> image(bytes);
    job.bytes(image.data(), bytes);

    void *const memory = mmap(reinterpret_cast<void *>(address), bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (memory != reinterpret_cast<void *>(address)) simt::fail("the address is taken");
    for (uint64_t order : orders) {
        memcpy(memory, image.data(), bytes);
        __asan_poison_memory_region(memory, bytes);
        for (size_t i = 0; i < regions.size(); i += 2) {
            __asan_unpoison_memory_region(reinterpret_cast<void *>(regions[i]), regions[i + 1]);
        }
        for (const Launch &launch : launches) {
            simt::launch(*launch.kernel, launch.grid, launch.params.data(), order,
                         {static_cast<unsigned char *>(memory) + callers, bytes - callers});
        }
        __asan_unpoison_memory_region(memory, bytes);
        if (fwrite(memory, 1, bytes, out) != bytes) simt::fail("cannot write the output");
    }
    fclose(out);
    return 0;
}

} // namespace

int main(int count, char **arguments) {
    if (count == 2 && strcmp(arguments[1], "layout") == 0) {
        print_layout();
        return 0;
    }
    if (count == 2 && strcmp(arguments[1], "kernels") == 0) {
        for (const simt::Kernel *k = simt::Kernel::first(); k; k = k->next) puts(k->name);
        return 0;
    }
    if (count == 4 && strcmp(arguments[1], "run") == 0) return run(arguments[2], arguments[3]);
    fprintf(stderr, "usage: simt layout | simt kernels | simt run JOB OUT\n");
    return 2;
}
