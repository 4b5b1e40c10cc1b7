/*
 * A plan after fork: its worker threads do not exist in the child, where calls must still answer,
 * with the same bits, and never hang. (Data loaders of training frameworks fork.)
 */

#include "support.h"

#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* So many tokens that the parent's calls do use its workers. */
enum { T = 2304, D = 128, K = 8, PATIENCE_SECONDS = 120 };

typedef struct {
  double loss_sum;
  float *z, *grad;
} result;

static result new_result(void) {
  result out = {0, NULL, NULL};
  out.z = floats(T * K);
  out.grad = floats(T * D);
  return out;
}

static void free_result(result *out) {
  free(out->z);
  free(out->grad);
}

static int compute(const blockem_plan *plan, const float *hidden, const float *reference,
                   result *out) {
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
  void *block;
  int failed = 0;
  encode.hidden = args.hidden = f32_2(hidden, T, D);
  encode.latents = f32_2(out->z, T, K);
  args.reference = f32_2(reference, T, K);
  args.loss_sum = f64_1(&out->loss_sum, 1);
  args.grad_hidden = f32_2(out->grad, T, D);
  failed |= blockem_plan_workspace_size(plan, T, &args.workspace_size);
  args.workspace = aligned64(args.workspace_size, &block);
  failed |= blockem_encode(plan, &encode, NULL);
  failed |= blockem_penalty(plan, &args, NULL);
  free(block);
  return failed;
}

/* What the child does; its exit status says what went wrong. */
static int child(blockem_plan *plan, const float *hidden, const float *reference,
                 const result *expected) {
  result out = new_result();
  blockem_plan *own;
  if (compute(plan, hidden, reference, &out) != 0) return 10;
  if (memcmp(out.z, expected->z, T * K * 4) != 0) return 11;
  if (memcmp(out.grad, expected->grad, T * D * 4) != 0) return 12;
  if (out.loss_sum != expected->loss_sum) return 13;
  blockem_plan_free(plan);

  own = random_plan(D, K, 2);
  if (compute(own, hidden, reference, &out) != 0) return 20;
  if (memcmp(out.grad, expected->grad, T * D * 4) != 0) return 21;
  blockem_plan_free(own);
  free_result(&out);
  return 0;
}

/* The child's exit status; -1 when it had to be killed. */
static int wait_for(pid_t pid) {
  const struct timespec pause = {0, 20 * 1000 * 1000};
  int status = 0, i;
  for (i = 0; i < PATIENCE_SECONDS * 50; i++) {
    if (waitpid(pid, &status, WNOHANG) == pid) {
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    nanosleep(&pause, NULL);
  }
  kill(pid, SIGKILL);
  waitpid(pid, &status, 0);
  return -1;
}

static void fork_with(int32_t num_threads, int used_before) {
  float *hidden = random_floats(T * D, 51), *reference = random_floats(T * K, 52);
  blockem_plan *alone = random_plan(D, K, 1);
  blockem_plan *plan = random_plan(D, K, num_threads);
  result expected = new_result(), again = new_result();
  pid_t pid;
  int code;

  CHECK(compute(alone, hidden, reference, &expected) == 0);
  if (used_before) CHECK(compute(plan, hidden, reference, &again) == 0);
  pid = fork();
  if (pid == 0) _exit(child(plan, hidden, reference, &expected));
  code = wait_for(pid);
  if (code != 0) {
    fprintf(stderr, "%d threads, %s before the fork: the child %s (%d)\n", (int)num_threads,
            used_before ? "used" : "not used", code < 0 ? "hangs" : "failed", code);
    check_failures++;
  }
  /* The parent goes on. */
  CHECK(compute(plan, hidden, reference, &again) == 0);
  CHECK(memcmp(again.grad, expected.grad, T * D * 4) == 0);

  free_result(&again);
  free_result(&expected);
  blockem_plan_free(plan);
  blockem_plan_free(alone);
  free(reference);
  free(hidden);
}

int main(void) {
  fork_with(2, 1);
  fork_with(2, 0);
  fork_with(1, 1);
  return finish_checks("fork");
}
