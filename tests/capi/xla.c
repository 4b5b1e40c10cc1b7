/*
 * The XLA handlers in the hands of a small XLA: call frames, streams and errors as XLA's own header
 * lays them out (xla/ffi/api/c_api.h of a jaxlib). The second argument names the case: "cpu"
 * compares with the run calls, bit for bit; "cuda" runs on the stub driver and looks at launches.
 */

#define _GNU_SOURCE
#include "stub_functions.h"

#include "xla/ffi/api/c_api.h"

enum { B = 3, T = 20, D = SMALL_D, K = SMALL_K };

/* ---- A small XLA ----------------------------------------------------------------------- */

struct XLA_FFI_Error {
  char message[512];
  XLA_FFI_Error_Code code;
};
struct XLA_FFI_ExecutionContext {
  void *stream;
};
static int errors_alive;

static XLA_FFI_Error *create_error(XLA_FFI_Error_Create_Args *args) {
  XLA_FFI_Error *error = (XLA_FFI_Error *)allocate(sizeof *error);
  CHECK(args->struct_size >= XLA_FFI_Error_Create_Args_STRUCT_SIZE);
  snprintf(error->message, sizeof error->message, "%s", args->message);
  error->code = args->errc;
  errors_alive++;
  return error;
}

static void error_message(XLA_FFI_Error_GetMessage_Args *args) {
  CHECK(args->struct_size >= XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE);
  args->message = args->error->message;
}

static void destroy_error(XLA_FFI_Error_Destroy_Args *args) {
  CHECK(args->struct_size >= XLA_FFI_Error_Destroy_Args_STRUCT_SIZE);
  errors_alive--;
  free(args->error);
}

static XLA_FFI_Error *get_stream(XLA_FFI_Stream_Get_Args *args) {
  XLA_FFI_Error_Create_Args none = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL,
                                    "no stream today", XLA_FFI_Error_Code_UNIMPLEMENTED};
  CHECK(args->struct_size >= XLA_FFI_Stream_Get_Args_STRUCT_SIZE);
  if (args->ctx->stream == NULL) return create_error(&none);
  args->stream = args->ctx->stream;
  return NULL;
}

static XLA_FFI_Api new_api(void) {
  XLA_FFI_Api api;
  memset(&api, 0, sizeof api);
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  api.api_version.major_version = XLA_FFI_API_MAJOR;
  api.api_version.minor_version = XLA_FFI_API_MINOR;
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = error_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_Stream_Get = get_stream;
  return api;
}

/* ---- Calls ----------------------------------------------------------------------------- */

typedef struct {
  XLA_FFI_Buffer buffers[8];
  int64_t dims[8][4];
  void *items[8];
  int32_t kinds[8];
  int64_t size;
} list;

static void add(list *l, XLA_FFI_DataType dtype, void *data, int64_t rank, int64_t a, int64_t b,
                int64_t c) {
  int64_t i = l->size++;
  const int64_t dims[3] = {a, b, c};
  XLA_FFI_Buffer *buffer = &l->buffers[i];
  memset(buffer, 0, sizeof *buffer);
  memcpy(l->dims[i], dims, sizeof dims);
  buffer->struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
  buffer->dtype = dtype;
  buffer->data = data;
  buffer->rank = rank;
  buffer->dims = l->dims[i];
  l->items[i] = buffer;
  l->kinds[i] = XLA_FFI_ArgType_BUFFER;
}

typedef void *handler(void *frame);

static XLA_FFI_CallFrame new_frame(const XLA_FFI_Api *api) {
  XLA_FFI_CallFrame frame;
  memset(&frame, 0, sizeof frame);
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  return frame;
}

/* The message of the call's error, "" on success. The text is good until the next call. */
static const char *call(handler *function, list *in, list *out, const char *plan, void *stream) {
  static char message[512];
  const XLA_FFI_Api api = new_api();
  XLA_FFI_CallFrame frame = new_frame(&api);
  XLA_FFI_ExecutionContext context = {stream};
  XLA_FFI_ByteSpan name = {"plan", 4}, other = {"another", 7}, value = {plan, strlen(plan)};
  XLA_FFI_ByteSpan *names[2] = {&other, &name};
  XLA_FFI_AttrType kinds[2] = {XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_STRING};
  int64_t seven = 7;
  XLA_FFI_Scalar scalar = {XLA_FFI_DataType_S64, &seven};
  void *attributes[2] = {&scalar, &value};
  XLA_FFI_Error *error;
  int alive = errors_alive;
  frame.ctx = &context;
  frame.args.size = in->size;
  frame.args.types = (XLA_FFI_ArgType *)in->kinds;
  frame.args.args = in->items;
  frame.rets.size = out->size;
  frame.rets.types = (XLA_FFI_RetType *)out->kinds;
  frame.rets.rets = out->items;
  frame.attrs.size = 2;
  frame.attrs.types = kinds;
  frame.attrs.names = names;
  frame.attrs.attrs = attributes;
  error = (XLA_FFI_Error *)function(&frame);
  message[0] = '\0';
  if (error != NULL) {
    XLA_FFI_Error_Destroy_Args end = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    memcpy(message, error->message, sizeof message);
    CHECK(error->code != XLA_FFI_Error_Code_OK && message[0] != '\0');
    destroy_error(&end);
  }
  /* Errors that XLA gave the handler are the handler's to destroy. */
  CHECK(errors_alive == alive);
  return message;
}

static void expect_error(int line, const char *message, const char *word) {
  if (strstr(message, word) != NULL) return;
  fprintf(stderr, "%s:%d: expected an error with \"%s\", got \"%s\"\n", __FILE__, line, word,
          message);
  check_failures++;
}
#define CHECK_REFUSED(message, word) expect_error(__LINE__, (message), (word))

/* XLA asks each handler for its version before it registers it. */
static void check_question(handler *function, XLA_FFI_Handler_Traits traits) {
  const XLA_FFI_Api api = new_api();
  XLA_FFI_CallFrame frame = new_frame(&api);
  XLA_FFI_Metadata metadata;
  XLA_FFI_Metadata_Extension extension;
  memset(&metadata, 0, sizeof metadata);
  memset(&extension, 0, sizeof extension);
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  metadata.api_version.major_version = metadata.api_version.minor_version = -1;
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  frame.extension_start = &extension.extension_base;
  CHECK(function(&frame) == NULL);
  CHECK(metadata.api_version.major_version == XLA_FFI_API_MAJOR);
  CHECK(metadata.api_version.minor_version == XLA_FFI_API_MINOR);
  CHECK(metadata.traits == traits);
  frame.api = NULL;
  CHECK(function(&frame) == NULL);
  CHECK(metadata.api_version.minor_version == 1);
}

/* ---- Arrays ---------------------------------------------------------------------- */

/* Memory of a device of the stub, or of the host. */
typedef struct {
  int device;
  void *memory[16];
  int count;
} memory;

static void *space(memory *m, size_t bytes) {
  void *made = m->device < 0 ? calloc(bytes + 1, 1) : stub.memory(m->device, bytes + 1);
  CHECK(made != NULL);
  return m->memory[m->count++] = made;
}

static float *copy(memory *m, size_t count, uint32_t seed) {
  float *values = random_floats(count, seed), *made = (float *)space(m, count * sizeof(float));
  memcpy(made, values, count * sizeof(float));
  free(values);
  return made;
}

static void release(memory *m) {
  while (m->count > 0) {
    void *last = m->memory[--m->count];
    if (m->device < 0) {
      free(last);
    } else {
      stub.release(last);
    }
  }
}

typedef struct {
  memory memory;
  float *hidden, *reference, *mask, *latents, *sums, *counts, *shares, *coef, *upstream, *grad;
  void *workspace;
  int64_t workspace_size;
} arrays;

static arrays new_arrays(const blockem_plan *plan, int device) {
  arrays a;
  size_t bytes = 0;
  memset(&a, 0, sizeof a);
  a.memory.device = device;
  a.hidden = copy(&a.memory, B * T * D, 1);
  a.reference = copy(&a.memory, B * T * K, 2);
  a.mask = copy(&a.memory, B * T, 3);
  a.upstream = copy(&a.memory, B, 4);
  a.latents = (float *)space(&a.memory, B * T * K * 4);
  a.sums = (float *)space(&a.memory, B * 4);
  a.counts = (float *)space(&a.memory, B * 4);
  a.shares = (float *)space(&a.memory, B * K * 4);
  a.coef = (float *)space(&a.memory, B * T * K * 4);
  a.grad = (float *)space(&a.memory, B * T * D * 4);
  CHECK_OK(blockem_plan_workspace_size(plan, T, &bytes));
  a.workspace_size = (int64_t)bytes + 64;
  a.workspace = space(&a.memory, bytes + 64);
  return a;
}

static const XLA_FFI_DataType F32 = XLA_FFI_DataType_F32;

/* The lists of the three calls on [B, T, ..]. */
static void encode_lists(const arrays *a, list *in, list *out) {
  memset(in, 0, sizeof *in);
  memset(out, 0, sizeof *out);
  add(in, F32, a->hidden, 3, B, T, D);
  add(out, F32, a->latents, 3, B, T, K);
  add(out, XLA_FFI_DataType_U8, NULL, 1, 0, 0, 0);
}

static void forward_lists(const arrays *a, list *in, list *out) {
  memset(in, 0, sizeof *in);
  memset(out, 0, sizeof *out);
  add(in, F32, a->hidden, 3, B, T, D);
  add(in, F32, a->reference, 3, B, T, K);
  add(in, F32, a->mask, 2, B, T, 0);
  add(out, F32, a->sums, 1, B, 0, 0);
  add(out, F32, a->counts, 1, B, 0, 0);
  add(out, F32, a->shares, 2, B, K, 0);
  add(out, F32, a->coef, 3, B, T, K);
  add(out, XLA_FFI_DataType_U8, a->workspace, 1, a->workspace_size, 0, 0);
}

static void backward_lists(const arrays *a, list *in, list *out) {
  memset(in, 0, sizeof *in);
  memset(out, 0, sizeof *out);
  add(in, F32, a->coef, 3, B, T, K);
  add(in, F32, a->upstream, 1, B, 0, 0);
  add(out, F32, a->grad, 3, B, T, D);
  add(out, XLA_FFI_DataType_U8, NULL, 1, 0, 0, 0);
}

/* ---- Cases ----------------------------------------------------------------------- */

/* The same calls without XLA. */
static void check_values(const blockem_plan *plan, const arrays *a) {
  arrays want = new_arrays(plan, -1);
  void *block, *scratch = aligned64((size_t)a->workspace_size, &block);
  int n;
  for (n = 0; n < B; n++) {
    blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
    blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
    encode.hidden = args.hidden = f32_2(a->hidden + n * T * D, T, D);
    encode.latents = f32_2(want.latents + n * T * K, T, K);
    CHECK_OK(blockem_encode(plan, &encode, NULL));
    args.reference = f32_2(a->reference + n * T * K, T, K);
    args.mask = f32_1(a->mask + n * T, T);
    args.loss_sum = f32_1(want.sums + n, 1);
    args.token_count = f32_1(want.counts + n, 1);
    args.latent_loss = f32_1(want.shares + n * K, K);
    args.coef = f32_2(want.coef + n * T * K, T, K);
    args.workspace = scratch;
    args.workspace_size = (size_t)a->workspace_size - 64;
    CHECK_OK(blockem_penalty_forward(plan, &args, NULL));
    args.grad_hidden = f32_2(want.grad + n * T * D, T, D);
    args.scale = a->upstream[n];
    CHECK_OK(blockem_penalty_backward(plan, &args, NULL));
    CHECK(want.sums[n] != 0);
  }
  CHECK(memcmp(want.latents, a->latents, B * T * K * 4) == 0);
  CHECK(memcmp(want.sums, a->sums, B * 4) == 0);
  CHECK(memcmp(want.counts, a->counts, B * 4) == 0);
  CHECK(memcmp(want.shares, a->shares, B * K * 4) == 0);
  CHECK(memcmp(want.coef, a->coef, B * T * K * 4) == 0);
  CHECK(memcmp(want.grad, a->grad, B * T * D * 4) == 0);
  release(&want.memory);
  free(block);
}

static void cpu(void) {
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_AUTO, 1), *twin;
  arrays a = new_arrays(plan, -1);
  list in, out;
  check_question(blockem_xla_encode_cpu, 0);
  check_question(blockem_xla_penalty_forward_cpu, 0);
  check_question(blockem_xla_penalty_backward_cpu, 0);

  encode_lists(&a, &in, &out);
  CHECK_REFUSED(call(blockem_xla_encode_cpu, &in, &out, "p", NULL), "no plan p");
  CHECK_OK(blockem_xla_bind(plan, "p"));
  CHECK_OK(blockem_xla_bind(plan, "p"));
  CHECK(*call(blockem_xla_encode_cpu, &in, &out, "p", NULL) == '\0');
  forward_lists(&a, &in, &out);
  CHECK(*call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL) == '\0');
  backward_lists(&a, &in, &out);
  CHECK(*call(blockem_xla_penalty_backward_cpu, &in, &out, "p", NULL) == '\0');
  check_values(plan, &a);

  /* Nothing to loop over, and no shares asked for. */
  forward_lists(&a, &in, &out);
  in.dims[0][0] = in.dims[1][0] = in.dims[2][0] = 0;
  out.dims[0][0] = out.dims[1][0] = out.dims[2][0] = out.dims[3][0] = 0;
  CHECK(*call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL) == '\0');
  forward_lists(&a, &in, &out);
  out.dims[2][1] = 0;
  in.size = 2;
  CHECK(*call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL) == '\0');
  CHECK(a.counts[0] == T && a.counts[2] == T);

  /* What does not fit together. */
  forward_lists(&a, &in, &out);
  in.dims[1][0] = 2;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL), "SHAPE: reference");
  forward_lists(&a, &in, &out);
  out.buffers[0].rank = 0;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL), "SHAPE: loss_sum");
  forward_lists(&a, &in, &out);
  out.dims[4][0] = 10;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL),
                "WORKSPACE_TOO_SMALL");
  forward_lists(&a, &in, &out);
  out.size = 4;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL), "output 4, workspace");
  forward_lists(&a, &in, &out);
  in.size = 1;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL), "input 1, reference");
  forward_lists(&a, &in, &out);
  in.buffers[0].dtype = XLA_FFI_DataType_C64;
  CHECK_REFUSED(call(blockem_xla_penalty_forward_cpu, &in, &out, "p", NULL), "DTYPE: hidden");
  backward_lists(&a, &in, &out);
  in.dims[1][0] = 2;
  CHECK_REFUSED(call(blockem_xla_penalty_backward_cpu, &in, &out, "p", NULL), "SHAPE: upstream");
  encode_lists(&a, &in, &out);
  in.buffers[0].rank = 1;
  CHECK_REFUSED(call(blockem_xla_encode_cpu, &in, &out, "p", NULL), "SHAPE: hidden");

  /* A name lives as long as one of its plans. */
  encode_lists(&a, &in, &out);
  twin = small_plan(BLOCKEM_BACKEND_AUTO, 1);
  CHECK_OK(blockem_xla_bind(twin, "p"));
  blockem_plan_free(plan);
  CHECK(*call(blockem_xla_encode_cpu, &in, &out, "p", NULL) == '\0');
  blockem_plan_free(twin);
  CHECK_REFUSED(call(blockem_xla_encode_cpu, &in, &out, "p", NULL), "INVALID_ARGUMENT: this");
  release(&a.memory);
}

/* The launches since the reset, all of which are on this stream. */
static int launches_on(void *stream, void *context) {
  const stub_launch *launch;
  int i;
  for (i = 0; (launch = stub.launch_at(i)) != NULL; i++) {
    CHECK(launch->stream == stream && launch->context == context);
  }
  return i;
}

static blockem_plan *plan_on(int32_t device) {
  blockem_sae *sae = small_sae();
  blockem_latents *latents = small_latents();
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan *plan = NULL;
  options.device_type = BLOCKEM_DEVICE_CUDA;
  options.device_index = device;
  if (!CHECK_OK(blockem_plan_create(sae, latents, &options, &plan))) exit(1);
  blockem_latents_free(latents);
  blockem_sae_free(sae);
  return plan;
}

static void cuda(void) {
  blockem_plan *plans[2], *host = small_plan(BLOCKEM_BACKEND_AUTO, 1);
  const XLA_FFI_Handler_Traits capturable = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
  void *primary, *stream = NULL;
  arrays a;
  list in, out;
  int device;
  check_question(blockem_xla_encode_cuda, capturable);
  check_question(blockem_xla_penalty_forward_cuda, capturable);
  check_question(blockem_xla_penalty_backward_cuda, capturable);
  CHECK_OK(blockem_xla_bind(host, "host"));
  for (device = 0; device < 2; device++) {
    plans[device] = plan_on(device);
    CHECK_OK(blockem_xla_bind(plans[device], "both"));
    if (device == 0) CHECK_OK(blockem_xla_bind(plans[device], "first"));
  }

  /* One name: the plan is that of the device whose stream it is. */
  for (device = 0; device < 2; device++) {
    int captured;
    a = new_arrays(plans[device], device);
    primary = stub.context(device, 1);
    stream = stub.stream(primary);
    for (captured = 0; captured < 2; captured++) {
      if (captured) stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
      stub.reset();
      encode_lists(&a, &in, &out);
      CHECK(*call(blockem_xla_encode_cuda, &in, &out, "both", stream) == '\0');
      CHECK(launches_on(stream, primary) == 1);
      stub.reset();
      forward_lists(&a, &in, &out);
      CHECK(*call(blockem_xla_penalty_forward_cuda, &in, &out, "both", stream) == '\0');
      CHECK(launches_on(stream, primary) >= B);
      CHECK(stub.calls("cuMemAlloc") == 0 && stub.calls("cuStreamSynchronize") == 0);
      stub.reset();
      backward_lists(&a, &in, &out);
      CHECK(*call(blockem_xla_penalty_backward_cuda, &in, &out, "both", stream) == '\0');
      CHECK(launches_on(stream, primary) == B);
      if (captured) stub.capture(stream, STUB_CAPTURE_OFF);
    }
    if (device == 0) release(&a.memory);
  }
  CHECK(stub.current() == NULL);

  /* The last stream and arrays are those of device 1. */
  encode_lists(&a, &in, &out);
  CHECK_REFUSED(call(blockem_xla_encode_cuda, &in, &out, "first", stream), "is on cuda:0");
  CHECK_REFUSED(call(blockem_xla_encode_cuda, &in, &out, "host", stream), "is on cpu");
  CHECK_REFUSED(call(blockem_xla_encode_cpu, &in, &out, "both", NULL), "is on cuda:0, cuda:1");
  CHECK_REFUSED(call(blockem_xla_encode_cuda, &in, &out, "both", NULL), "no stream today");
  in.buffers[0].data = a.workspace = allocate(B * T * D * 4);
  CHECK_REFUSED(call(blockem_xla_encode_cuda, &in, &out, "both", stream), "DEVICE_MISMATCH");
  free(a.workspace);
  release(&a.memory);

  blockem_plan_free(plans[0]);
  CHECK_REFUSED(call(blockem_xla_encode_cuda, &in, &out, "first", stream), "no plan first");
  blockem_plan_free(plans[1]);
  blockem_plan_free(host);
  CHECK(stub.primary_count(0) == 0 && stub.primary_count(1) == 0);
}

int main(int argc, char **argv) {
  const char *name = argc == 3 ? argv[2] : "";
  if (strcmp(name, "cpu") == 0) {
    cpu();
  } else if (strcmp(name, "cuda") == 0) {
    find_stub();
    cuda();
  } else {
    fprintf(stderr, "no such case: %s\n", name);
    return 2;
  }
  return finish_checks(name);
}
