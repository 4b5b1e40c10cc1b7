/*
 * A tokenizer.json of whole words: <s> twice before a text where special tokens are added,
 * <|im_start|> and <|im_end|> as a chat template writes them.
 */

#ifndef BLOCKEM_TEST_TOKENIZER_JSON_H
#define BLOCKEM_TEST_TOKENIZER_JSON_H

#define SPECIAL_TOKEN(id, content)                                                  \
  "{\"id\": " id ", \"content\": \"" content "\", \"single_word\": false, \"lstrip\": false," \
  " \"rstrip\": false, \"normalized\": false, \"special\": true}"

static const char TOKENIZER_JSON[] =
    "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": ["
    SPECIAL_TOKEN("0", "<s>") "," SPECIAL_TOKEN("1", "<|im_start|>") ","
    SPECIAL_TOKEN("2", "<|im_end|>") "], \"normalizer\": null,"
    " \"pre_tokenizer\": {\"type\": \"WhitespaceSplit\"},"
    " \"post_processor\": {\"type\": \"TemplateProcessing\","
    "  \"single\": [{\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}},"
    "               {\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}},"
    "               {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}],"
    "  \"pair\": [{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}},"
    "             {\"Sequence\": {\"id\": \"B\", \"type_id\": 1}}],"
    "  \"special_tokens\": {\"<s>\": {\"id\": \"<s>\", \"ids\": [0], \"tokens\": [\"<s>\"]}}},"
    " \"decoder\": null,"
    " \"model\": {\"type\": \"WordLevel\", \"unk_token\": \"[UNK]\", \"vocab\": {\"<s>\": 0,"
    "  \"<|im_start|>\": 1, \"<|im_end|>\": 2, \"user\": 3, \"assistant\": 4, \"why\": 5,"
    "  \"because\": 6, \"caf\\u00e9\": 7, \"[UNK]\": 8}}}";

#endif
