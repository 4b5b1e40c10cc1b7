/*
 * Many threads on one plan at once: each gets the bits that one thread alone gets. Plans are also
 * made and freed meanwhile. A second argument gives the number of rounds.
 */

#include "support.h"

#include <pthread.h>

/* So much work for each call that a plan's own threads share it. */
enum { THREADS = 6, T = 2304, D = 128, K = 8 };

static int rounds = 20;

typedef struct {
  double loss_sum, token_count;
  float z[T * K], coef[T * K], grad[T * D];
} result;

typedef struct {
  const blockem_plan *plan;
  const float *hidden, *reference;
  const result *expected;
  int different, failed;
} job;

/* One encode and one penalty with its own outputs and workspace. */
static int compute(const blockem_plan *plan, const float *hidden, const float *reference,
                   result *out) {
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
  void *block;
  int failed = 0;
  memset(out, 0, sizeof *out);
  encode.hidden = args.hidden = f32_2(hidden, T, D);
  encode.latents = f32_2(out->z, T, K);
  args.reference = f32_2(reference, T, K);
  args.coef = f32_2(out->coef, T, K);
  args.loss_sum = f64_1(&out->loss_sum, 1);
  args.token_count = f64_1(&out->token_count, 1);
  args.grad_hidden = f32_2(out->grad, T, D);
  failed |= blockem_plan_workspace_size(plan, T, &args.workspace_size);
  args.workspace = aligned64(args.workspace_size, &block);
  failed |= blockem_encode(plan, &encode, NULL);
  failed |= blockem_penalty(plan, &args, NULL);
  free(block);
  return failed;
}

static void *work(void *argument) {
  job *mine = (job *)argument;
  result *out = (result *)allocate(sizeof *out);
  int round;
  for (round = 0; round < rounds; round++) {
    mine->failed |= compute(mine->plan, mine->hidden, mine->reference, out);
    mine->different += memcmp(out, mine->expected, sizeof *out) != 0;
  }
  free(out);
  return NULL;
}

static void *make_and_free(void *unused) {
  int round;
  (void)unused;
  for (round = 0; round < rounds; round++) blockem_plan_free(random_plan(D, K, 2));
  return NULL;
}

static void together(int32_t num_threads) {
  float *hidden = random_floats(T * D, 41), *reference = random_floats(T * K, 42);
  blockem_plan *plan = random_plan(D, K, num_threads);
  blockem_plan *alone = random_plan(D, K, 1);
  result *expected = (result *)allocate(sizeof *expected);
  pthread_t threads[THREADS], maker;
  job jobs[THREADS];
  int i;
  CHECK(compute(alone, hidden, reference, expected) == 0);
  CHECK(expected->loss_sum > 0 && expected->token_count == T);
  CHECK(pthread_create(&maker, NULL, make_and_free, NULL) == 0);
  for (i = 0; i < THREADS; i++) {
    job mine = {NULL, NULL, NULL, NULL, 0, 0};
    mine.plan = plan;
    mine.hidden = hidden;
    mine.reference = reference;
    mine.expected = expected;
    jobs[i] = mine;
    CHECK(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0);
  }
  for (i = 0; i < THREADS; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(jobs[i].failed == 0);
    CHECK(jobs[i].different == 0);
  }
  CHECK(pthread_join(maker, NULL) == 0);
  free(expected);
  blockem_plan_free(alone);
  blockem_plan_free(plan);
  free(reference);
  free(hidden);
}

int main(int argc, char **argv) {
  if (argc > 2) rounds = atoi(argv[2]);
  together(1);
  together(2);
  together(0);
  return finish_checks("threads");
}
