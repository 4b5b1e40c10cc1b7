/*
 * A reference cache: what is stored comes back bit for bit, a batch at a time; examples of the same
 * tokens and other images are apart; a handle in a child of fork is refused and freed there without
 * harm to the parent's.
 */

#include "support.h"

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 3, LONGEST = 9 };

static const int64_t token_ids[LONGEST] = {5, 6, 7, 8, 9, 10, 11, 12, 13};

static blockem_cache *open_cache(const char *path, int32_t mode, const blockem_plan *plan) {
  blockem_cache_options options = BLOCKEM_CACHE_OPTIONS_INIT;
  blockem_cache *cache = NULL;
  options.mode = mode;
  options.base_model = "base";
  options.hidden_dtype = BLOCKEM_DTYPE_F32;
  options.plan = plan;
  if (!CHECK_OK(blockem_cache_open(path, &options, &cache))) exit(1);
  return cache;
}

/* Examples of 9, 6 and 3 tokens: their keys, and their places in one padded [N, LONGEST, K] array. */
static void examples(const blockem_cache *cache, float *z, uint8_t *keys, blockem_tensor *latents) {
  int i;
  for (i = 0; i < N; i++) {
    int64_t tokens = LONGEST - 3 * i;
    CHECK_OK(blockem_cache_example_key(cache, token_ids, NULL, (size_t)tokens,
                                       keys + i * BLOCKEM_CACHE_KEY_SIZE));
    latents[i] = f32_2(z + i * LONGEST * SMALL_K, tokens, SMALL_K);
  }
}

static void round_trip(const char *path, const blockem_plan *plan) {
  float *hidden = random_floats(N * LONGEST * SMALL_D, 3), *z = floats(N * LONGEST * SMALL_K);
  float *back = floats(N * LONGEST * SMALL_K);
  uint8_t keys[N * BLOCKEM_CACHE_KEY_SIZE], missing[N * SMALL_K];
  blockem_tensor latents[N];
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_cache_info info = BLOCKEM_CACHE_INFO_INIT;
  blockem_cache *cache = open_cache(path, BLOCKEM_CACHE_MODE_CREATE, plan);
  uint64_t written = 77;
  int i;

  encode.hidden = f32_2(hidden, N * LONGEST, SMALL_D);
  encode.latents = f32_2(z, N * LONGEST, SMALL_K);
  CHECK_OK(blockem_encode(plan, &encode, NULL));
  examples(cache, z, keys, latents);
  CHECK(memcmp(keys, keys + BLOCKEM_CACHE_KEY_SIZE, BLOCKEM_CACHE_KEY_SIZE) != 0);

  CHECK_OK(blockem_cache_put(cache, plan, keys, latents, 1, &written));
  CHECK(written == SMALL_K);
  CHECK_OK(blockem_cache_missing(cache, plan, keys, N, missing));
  for (i = 0; i < N * SMALL_K; i++) CHECK(missing[i] == (i >= SMALL_K));
  CHECK_OK(blockem_cache_put(cache, plan, keys, latents, N, &written));
  CHECK(written == (N - 1) * SMALL_K);
  blockem_cache_free(cache);

  cache = open_cache(path, BLOCKEM_CACHE_MODE_READ, plan);
  CHECK_OK(blockem_cache_info_get(cache, &info));
  CHECK(info.num_examples == N && info.num_columns == SMALL_K);
  memset(back, 0x55, N * LONGEST * SMALL_K * sizeof *back);
  examples(cache, back, keys, latents);
  CHECK_OK(blockem_cache_get(cache, plan, keys, latents, N));
  for (i = 0; i < N; i++) {
    size_t at = (size_t)i * LONGEST * SMALL_K, held = (size_t)(LONGEST - 3 * i) * SMALL_K;
    uint32_t after = 0x55555555;
    CHECK(memcmp(back + at, z + at, held * sizeof *z) == 0);
    if (i > 0) CHECK(memcmp(back + at + held, &after, sizeof after) == 0);
  }
  blockem_cache_free(cache);
  free(back);
  free(z);
  free(hidden);
}

/* Two images for the same tokens, and none: three examples. Another writer finds the note. */
static void images_are_apart(const char *path, const blockem_plan *plan) {
  blockem_cache *cache = open_cache(path, BLOCKEM_CACHE_MODE_CREATE, plan);
  blockem_cache_example example = BLOCKEM_CACHE_EXAMPLE_INIT;
  float pixels[2][64] = {{0}}, *z = random_floats(N * SMALL_K, 5), *back = floats(N * SMALL_K);
  uint8_t keys[N * BLOCKEM_CACHE_KEY_SIZE], again[BLOCKEM_CACHE_KEY_SIZE];
  blockem_tensor latents[N];
  char text[8];
  size_t length = 77;
  int i, j;

  pixels[1][63] = 1e-3f;
  example.token_ids = token_ids;
  example.num_tokens = 1;
  for (i = 0; i < N; i++) {
    example.context = i < 2 ? pixels[i] : NULL;
    example.context_size = i < 2 ? sizeof pixels[i] : 0;
    CHECK_OK(blockem_cache_key(cache, &example, keys + i * BLOCKEM_CACHE_KEY_SIZE));
    for (j = 0; j < i; j++) {
      CHECK(memcmp(keys + i * BLOCKEM_CACHE_KEY_SIZE, keys + j * BLOCKEM_CACHE_KEY_SIZE,
                   BLOCKEM_CACHE_KEY_SIZE) != 0);
    }
    latents[i] = f32_2(z + i * SMALL_K, 1, SMALL_K);
  }
  CHECK_OK(blockem_cache_example_key(cache, token_ids, NULL, 1, again));
  CHECK(memcmp(again, keys + 2 * BLOCKEM_CACHE_KEY_SIZE, sizeof again) == 0);
  CHECK_OK(blockem_cache_put(cache, plan, keys, latents, 2, NULL));
  for (i = 0; i < N; i++) latents[i] = f32_2(back + i * SMALL_K, 1, SMALL_K);
  CHECK_OK(blockem_cache_get(cache, plan, keys, latents, 2));
  CHECK(memcmp(back, z, 2 * SMALL_K * sizeof *z) == 0);
  CHECK_STATUS(blockem_cache_get(cache, plan, keys, latents, N), BLOCKEM_STATUS_CACHE_MISS);
  CHECK(message_has("example 2 ") && message_has("another context"));

  CHECK_OK(blockem_cache_get_note(cache, "towers", NULL, 0, &length));
  CHECK(length == 0);
  CHECK_OK(blockem_cache_put_note(cache, "towers", "pixels, f32"));
  CHECK_OK(blockem_cache_get_note(cache, "towers", text, sizeof text, &length));
  CHECK(length == 11 && strcmp(text, "pixels,") == 0);
  CHECK_OK(blockem_cache_put_note(cache, "towers", "pixels, f32"));
  CHECK_STATUS(blockem_cache_put_note(cache, "towers", "pixels, bf16"),
               BLOCKEM_STATUS_CACHE_STALE);
  CHECK_STATUS(blockem_cache_put_note(cache, "", "x"), BLOCKEM_STATUS_INVALID_ARGUMENT);
  blockem_cache_free(cache);
  free(back);
  free(z);
}

/* What the child does; its exit status says what went wrong. */
static int child(blockem_cache *cache, const blockem_plan *plan, const char *path) {
  float z[LONGEST * SMALL_K] = {0};
  uint8_t keys[N * BLOCKEM_CACHE_KEY_SIZE] = {0};
  blockem_tensor latents = f32_2(z, LONGEST, SMALL_K);
  blockem_cache_options options = BLOCKEM_CACHE_OPTIONS_INIT;
  if (blockem_cache_get(cache, plan, keys, &latents, 1) != BLOCKEM_STATUS_FORKED) return 10;
  if (blockem_cache_put(cache, plan, keys, &latents, 1, NULL) != BLOCKEM_STATUS_FORKED) return 11;
  blockem_cache_free(cache);
  cache = NULL;
  /* The parent has it still. */
  if (blockem_cache_open(path, &options, &cache) != BLOCKEM_STATUS_CACHE_BUSY) return 12;
  return 0;
}

static void fork_with_a_writer(const char *path, const blockem_plan *plan) {
  float *z = random_floats(N * LONGEST * SMALL_K, 8);
  uint8_t keys[N * BLOCKEM_CACHE_KEY_SIZE];
  blockem_tensor latents[N];
  blockem_cache *cache = open_cache(path, BLOCKEM_CACHE_MODE_WRITE, plan);
  int status = 0;
  pid_t pid;

  keys[0] = 99;
  examples(cache, z, keys, latents);
  keys[0] ^= 1;
  CHECK_OK(blockem_cache_put(cache, plan, keys, latents, 1, NULL));
  pid = fork();
  if (pid == 0) _exit(child(cache, plan, path));
  CHECK(waitpid(pid, &status, 0) == pid);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    fprintf(stderr, "the child failed (%d)\n", status);
    check_failures++;
  }

  /* The parent goes on, and its file is whole. */
  keys[1] ^= 1;
  CHECK_OK(blockem_cache_put(cache, plan, keys, latents, 1, NULL));
  blockem_cache_free(cache);
  cache = open_cache(path, BLOCKEM_CACHE_MODE_READ, plan);
  CHECK_OK(blockem_cache_get(cache, plan, keys, latents, 1));
  blockem_cache_free(cache);
  free(z);
}

int main(int argc, char **argv) {
  blockem_plan *plan;
  char *path;
  if (argc != 2) return 2;
  plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  path = join_path(argv[1], "images.cache");
  images_are_apart(path, plan);
  free(path);
  path = join_path(argv[1], "reference.cache");
  round_trip(path, plan);
  fork_with_a_writer(path, plan);
  blockem_plan_free(plan);
  free(path);
  return finish_checks("cache");
}
