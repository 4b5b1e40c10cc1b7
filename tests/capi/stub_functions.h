/* What a program asks of the stub driver (tests/stub_cuda) that it runs with. */

#ifndef BLOCKEM_TEST_STUB_FUNCTIONS_H
#define BLOCKEM_TEST_STUB_FUNCTIONS_H

#include "support.h"

#include "../stub_cuda/stub.h"

#include <dlfcn.h>

#define STUB_FUNCTIONS(each)                                                             \
  each(calls) each(reset) each(fail) each(context) each(current) each(set_current)       \
  each(primary_count) each(stream) each(capture) each(memory) each(release) each(adopt)  \
  each(alive) each(shut_down) each(launch_at)

static struct {
#define FIELD(name) stub_##name##_fn *name;
  STUB_FUNCTIONS(FIELD)
#undef FIELD
} stub;

static void find_stub(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(2);
  }
#define FIND(name) *(void **)&stub.name = dlsym(library, "stub_" #name);
  STUB_FUNCTIONS(FIND)
#undef FIND
  if (stub.launch_at == NULL) {
    fprintf(stderr, "libcuda.so.1 is not the stub\n");
    exit(2);
  }
}

#endif
