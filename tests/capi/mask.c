/*
 * Masks of the assistant's tokens: from spans, from role markers, from offsets of another
 * tokenizer, for a trainer's own ids; a tokenizer that is no tokenizer.
 */

#include "support.h"
#include "tokenizer_json.h"

#define USER "<|im_start|>user\nwhy <|im_end|>\n"
#define ANSWER "<|im_start|>assistant\nbecause caf\xc3\xa9 <|im_end|>"

enum { MOST = 16 };

static const char chat[] = USER ANSWER "\n" ANSWER;

static blockem_mask_options chatml(void) {
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT;
  options.start_marker = "<|im_start|>assistant\n";
  options.end_marker = "<|im_end|>";
  options.turn_marker = "<|im_start|>";
  return options;
}

static void expect(const int64_t *ids, const uint8_t *mask, size_t n, const char *expected) {
  size_t i;
  CHECK(n * 2 == strlen(expected));
  for (i = 0; i < n; i++) {
    CHECK(ids[i] == expected[2 * i] - '0');
    CHECK(mask[i] == (expected[2 * i + 1] == '*'));
  }
}

static void markers(const blockem_tokenizer *tokenizer) {
  blockem_mask_options options = chatml();
  int64_t ids[MOST];
  uint8_t mask[MOST], again[MOST];
  size_t n = 0, length = strlen(chat);

  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "1 3 5 2 1 4 6*7*2*1 4 6*7*2*");
  CHECK_OK(blockem_tokenizer_mask_ids(tokenizer, chat, length, &options, ids, n, again));
  CHECK(memcmp(mask, again, n) == 0);

  options.closing = BLOCKEM_CLOSING_EXCLUDE;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "1 3 5 2 1 4 6*7*2 1 4 6*7*2 ");

  options.add_special_tokens = 1;
  options.max_tokens = 9;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "0 0 1 3 5 2 1 4 6*");

  /* The number of tokens alone; an array that is too small is not touched. */
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, NULL, NULL, 0, &n));
  CHECK(n == 9);
  memset(mask, 0xa5, sizeof mask);
  n = 77;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, NULL, mask, 8, &n),
               BLOCKEM_STATUS_SHAPE);
  CHECK(message_has("9 tokens") && n == 77 && mask[0] == 0xa5);

  options.max_tokens = 8;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n),
               BLOCKEM_STATUS_MASK_EMPTY);
  options.allow_empty = 1;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "0 0 1 3 5 2 1 4 ");
  options.max_tokens = -1;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
}

static void spans(const blockem_tokenizer *tokenizer) {
  /* "because café" of the first answer alone, and two bytes more. */
  const int64_t begin = (int64_t)strlen(USER "<|im_start|>assistant\n");
  int64_t span[2], cut[2];
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT;
  int64_t ids[MOST];
  uint8_t mask[MOST];
  size_t n = 0, length = strlen(chat);

  span[0] = begin;
  span[1] = begin + 13;
  options.spans = span;
  options.num_spans = 1;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "1 3 5 2 1 4 6*7*2 1 4 6 7 2 ");

  cut[0] = begin + 3;
  cut[1] = begin + 13;
  options.spans = cut;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "1 3 5 2 1 4 6*7*2 1 4 6 7 2 ");
  options.border = BLOCKEM_BORDER_EXCLUDE;
  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n));
  expect(ids, mask, n, "1 3 5 2 1 4 6 7*2 1 4 6 7 2 ");
  options.border = BLOCKEM_BORDER_REFUSE;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n),
               BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("token 6") && message_has("because"));

  options.border = BLOCKEM_BORDER_INCLUDE;
  cut[1] = begin + 12;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("middle of a character"));
  options.num_spans = 0;
  CHECK_STATUS(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, mask, MOST, &n),
               BLOCKEM_STATUS_MASK_EMPTY);
}

static void trainers_ids(const blockem_tokenizer *tokenizer) {
  blockem_mask_options options = chatml();
  int64_t ids[MOST];
  uint8_t mask[MOST];
  size_t n = 0, length = strlen(chat);

  CHECK_OK(blockem_tokenizer_mask(tokenizer, chat, length, &options, ids, NULL, MOST, &n));
  ids[5] = 3;
  CHECK_STATUS(blockem_tokenizer_mask_ids(tokenizer, chat, length, &options, ids, n, mask),
               BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("position 5") && message_has("assistant"));
  ids[5] = 4;
  CHECK_STATUS(blockem_tokenizer_mask_ids(tokenizer, chat, length, &options, ids, n - 1, mask),
               BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("max_tokens"));
  options.max_tokens = (int64_t)n - 1;
  CHECK_OK(blockem_tokenizer_mask_ids(tokenizer, chat, length, &options, ids, n - 1, mask));
}

static void offsets(void) {
  static const int64_t places[][2] = {{0, 0}, {0, 4}, {4, 6}, {6, 12}};
  static const int64_t span[2] = {5, 12};
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT;
  uint8_t mask[4];
  options.spans = span;
  options.num_spans = 1;
  CHECK_OK(blockem_mask_from_offsets("why: because", 12, &options, places[0], 4, mask));
  CHECK(mask[0] == 0 && mask[1] == 0 && mask[2] == 1 && mask[3] == 1);
  options.max_tokens = 3;
  CHECK_STATUS(blockem_mask_from_offsets("why: because", 12, &options, places[0], 4, mask),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.max_tokens = 0;
  CHECK_STATUS(blockem_mask_from_offsets("why: becaus", 11, &options, places[0], 4, mask),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_mask_from_offsets("why: becaus\xff", 12, &options, places[0], 4, mask),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("UTF-8 at byte 11"));
}

static void bad_options(const blockem_tokenizer *tokenizer) {
  static const int64_t span[2] = {0, 1};
  static const char *const none[1] = {NULL}, *const ends[1] = {"<|im_end|>"};
  blockem_mask_options good = chatml(), options;
  size_t n;

#define CALL blockem_tokenizer_mask(tokenizer, chat, strlen(chat), &options, NULL, NULL, 0, &n)
#define REFUSED(word)                                    \
  do {                                                   \
    CHECK_STATUS(CALL, BLOCKEM_STATUS_INVALID_ARGUMENT); \
    CHECK(message_has(word));                            \
  } while (0)
  options = good;
  options.spans = span;
  REFUSED("spans and markers");
  options.start_marker = options.end_marker = NULL;
  REFUSED("turn_marker");
  options = good;
  options.end_marker = NULL;
  REFUSED("give spans");
  options = good;
  options.end_marker = "";
  REFUSED("end marker is empty");
  options = good;
  options.turn_marker = "assistant";
  REFUSED("does not begin with");
  options = good;
  options.other_turns = 3;
  REFUSED("other_turns is 3");
  options = good;
  options.end_markers = ends;
  REFUSED("end_marker and end_markers");
  options.end_marker = NULL;
  options.end_markers = none;
  REFUSED("no end marker");
  options.num_end_markers = 1;
  CHECK_STATUS(CALL, BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("end_markers[0]"));
  options.end_markers = NULL;
  CHECK_STATUS(CALL, BLOCKEM_STATUS_NULL_POINTER);
  options = good;
  options.start_marker = "\xff";
  REFUSED("UTF-8");
  options = good;
  options.closing = 2;
  REFUSED("closing 2");
  options = good;
  options.border = 3;
  REFUSED("border 3");
  options = good;
  options.allow_unclosed = 2;
  REFUSED("allow_unclosed");
  options = good;
  options.allow_empty = -1;
  REFUSED("allow_empty");
  options = good;
  options.add_special_tokens = 7;
  REFUSED("add_special_tokens");
  options = good;
  options.start_marker = options.end_marker = options.turn_marker = NULL;
  options.num_spans = 1;
  CHECK_STATUS(CALL, BLOCKEM_STATUS_NULL_POINTER);
}

/* Every byte of a text is a token. */
static void expect_marked(const char *text, const blockem_mask_options *options,
                          const char *expected) {
  int64_t places[256][2] = {{0}};
  uint8_t mask[256];
  char marked[257];
  size_t i, n = strlen(text), count = 0;
  CHECK(n <= 256);
  for (i = 0; i < n; i++) {
    places[i][0] = (int64_t)i;
    places[i][1] = (int64_t)i + 1;
  }
  CHECK_OK(blockem_mask_from_offsets(text, n, options, places[0], n, mask));
  for (i = 0; i < n; i++) {
    if (mask[i]) marked[count++] = text[i];
  }
  marked[count] = 0;
  CHECK(strcmp(marked, expected) == 0);
}

static void several_markers(void) {
  static const char *const ends[] = {"<|end|>", "<|call|>", "<|return|>"};
  static const char talk[] =
      "<|start|>user<|message|>U<|end|><|start|>assistant to=f<|message|>{}<|call|>"
      "<|start|>f to=assistant<|message|>R<|end|><|start|>assistant<|message|>A<|return|>";
  static const char said[] = " to=f<|message|>{}<|call|><|message|>A<|return|>";
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT, preset = BLOCKEM_MASK_OPTIONS_INIT;
  uint8_t mask[1];
  const int64_t place[2] = {0, 1};
  options.start_marker = "<|start|>assistant";
  options.end_markers = ends;
  options.num_end_markers = 3;
  expect_marked(talk, &options, said);
  options.turn_marker = "<|start|>";
  expect_marked(talk, &options, said);
  /* One end marker too few: the tool's reply is no part of the call's turn. */
  options.num_end_markers = 1;
  CHECK_STATUS(blockem_mask_from_offsets(talk, strlen(talk), &options, place, 1, mask),
               BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("end marker"));

  CHECK_OK(blockem_mask_preset("harmony", &preset));
  CHECK(preset.struct_size == sizeof preset && preset.num_end_markers == 3);
  CHECK(strcmp(preset.start_markers[0], "<|start|>assistant") == 0);
  expect_marked(talk, &preset, said);
  preset.closing = BLOCKEM_CLOSING_EXCLUDE;
  expect_marked(talk, &preset, " to=f<|message|>{}<|message|>A");
  CHECK_STATUS(blockem_mask_preset("harmony", &preset), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("in place of"));
}

static void presets(void) {
  static const char *const injected[1] = {"!"};
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT, again = BLOCKEM_MASK_OPTIONS_INIT;
  options.injected = "!";
  CHECK_OK(blockem_mask_preset("glm4", &options));
  CHECK(options.other_turns == BLOCKEM_OTHER_TURNS_OPEN && options.allow_unclosed == 1);
  expect_marked("<|user|>\nU<|assistant|>!A<|observation|>R<|assistant|>B", &options,
                "A<|observation|>B");
  options.turn_markers = options.injected_texts = injected;
  options.num_turn_markers = 0;
  options.num_injected_texts = 1;
  CHECK_STATUS(blockem_mask_from_offsets("why", 3, &options, NULL, 0, NULL),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("injected and injected_texts"));
  options.injected = NULL;
  expect_marked("<|user|>\nU<|assistant|>!A<|observation|>R<|assistant|>B", &options,
                "A<|observation|>B");
  CHECK_STATUS(blockem_mask_preset("glm", &again), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("\"glm\"") && message_has("chatml, qwen, harmony"));
  CHECK_STATUS(blockem_mask_preset(NULL, &again), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_preset("glm4", NULL), BLOCKEM_STATUS_NULL_POINTER);
  /* What a caller was compiled with before there were several markers. */
  again.struct_size = offsetof(blockem_mask_options, start_markers);
  CHECK_STATUS(blockem_mask_preset("glm4", &again), BLOCKEM_STATUS_STRUCT_SIZE);
  CHECK(again.start_markers == NULL);
}

static void files(const char *folder) {
  char *path = join_path(folder, "tokenizer.json"), *missing = join_path(folder, "missing.json");
  blockem_tokenizer *tokenizer = NULL;
  write_text(path, TOKENIZER_JSON);
  CHECK_OK(blockem_tokenizer_open(path, &tokenizer));
  blockem_tokenizer_free(tokenizer);
  CHECK_OK(blockem_tokenizer_open(folder, &tokenizer));
  blockem_tokenizer_free(tokenizer);
  tokenizer = NULL;
  CHECK_STATUS(blockem_tokenizer_open(missing, &tokenizer), BLOCKEM_STATUS_IO);
  CHECK(message_has("missing.json"));
  write_text(path, "{\"version\": \"1.0\"}");
  CHECK_STATUS(blockem_tokenizer_open(path, &tokenizer), BLOCKEM_STATUS_FORMAT);
  CHECK(message_has("tokenizer.json"));
  CHECK(tokenizer == NULL);
  free(missing);
  free(path);
}

int main(int argc, char **argv) {
  blockem_tokenizer *tokenizer = NULL;
  if (argc != 2) return 2;
  if (!CHECK_OK(blockem_tokenizer_from_json(TOKENIZER_JSON, strlen(TOKENIZER_JSON), &tokenizer))) {
    return 1;
  }
  markers(tokenizer);
  spans(tokenizer);
  trainers_ids(tokenizer);
  offsets();
  several_markers();
  presets();
  bad_options(tokenizer);
  blockem_tokenizer_free(tokenizer);
  files(argv[1]);
  return finish_checks("mask");
}
