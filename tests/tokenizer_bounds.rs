//! Junk for a tokenizer.json: files that were cut, changed and spliced end with an error or with a
//! tokenizer, never with a panic, in bounded memory, and with less work than a good file of the
//! largest size.

#![cfg(feature = "tokenizers")]

#[path = "fuzz/src/bounds.rs"]
#[allow(dead_code)] // A vocabulary of the largest size may take its time.
mod bounds;
mod support;

use std::time::Duration;

use blockem::error::Status;
use blockem::mask::{Border, MaskOptions, Turns};
use blockem::tokenizer::{TokenOptions, Tokenizer};
use serde_json::{Value, json};
use support::Rng;

#[global_allocator]
static ALLOCATOR: bounds::Counting = bounds::Counting;

const ROUNDS: usize = 4000;
/// A tokenizer of 8 MB of JSON takes 32 times as much memory when it is built; the bounds have 4
/// times what they are given.
const MEMORY: usize = 12;

/// One test: the bounds count what the whole process allocates.
#[test]
fn junk_ends_with_an_error_in_bounded_memory() {
    // Panics of the crate are caught; they would fill the screen.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.location().is_some_and(|at| at.file().starts_with("tests")) {
            print(panic);
        }
    }));
    let most = large();
    let mut random = Rng::fresh();
    let seeds: Vec<String> = seeds().iter().map(Value::to_string).collect();
    for seed in &seeds {
        assert!(opened(seed.as_bytes()).0.is_none(), "the seed itself opens: {seed}");
    }
    let mut refused = 0;
    for round in 0..ROUNDS {
        let mut bytes = seeds[round % seeds.len()].clone().into_bytes();
        for _ in 0..1 + random.below(4) {
            mutate(&mut bytes, &seeds, &mut random);
        }
        let (status, took) = opened(&bytes);
        let shown = || String::from_utf8_lossy(&bytes[..bytes.len().min(20_000)]).into_owned();
        assert!(took < most, "{took:?}, a good file of the largest size {most:?}: {}", shown());
        match status {
            None => {}
            Some(Status::Format) => refused += 1,
            Some(status) => panic!("{status:?}: {}", String::from_utf8_lossy(&bytes)),
        }
    }
    assert!(refused > ROUNDS / 4 && refused < ROUNDS, "{refused} of {ROUNDS} were refused");
}

/// A vocabulary of the largest models' size: so many bytes may live for each of the file's. Returns
/// the processor's time that it takes, on this machine and in this build.
fn large() -> Duration {
    let mut json = seeds().remove(0);
    let pairs = 0..125_000;
    let words = pairs.clone().flat_map(|i| [format!("t{i}"), format!("t{i}t{i}")]);
    let words = ["<|im_end|>", "<s>"].map(String::from).into_iter().chain(words);
    let vocab: serde_json::Map<String, Value> =
        words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let merges: Vec<Value> = pairs.map(|i| json!([format!("t{i}"), format!("t{i}")])).collect();
    json["model"]["vocab"] = Value::Object(vocab);
    json["model"]["merges"] = Value::Array(merges);
    let json = json.to_string();
    bounds::within_memory(MEMORY * json.len(), || {
        let (status, took) = opened(json.as_bytes());
        assert_eq!(status, None, "{} bytes", json.len());
        took
    })
}

/// The status with which a file is refused, and the processor's time that it took; a tokenizer must
/// take text, or refuse that.
fn opened(json: &[u8]) -> (Option<Status>, Duration) {
    let start = bounds::processor_time();
    let result = bounds::within_memory(MEMORY * json.len(), || Tokenizer::from_json(json));
    let status = match result {
        Err(error) => Some(error.status),
        Ok(tokenizer) => {
            let text = "why é🙂 <|im_end|>  because";
            let turns = Turns::Spans(vec![std::ops::Range { start: 0, end: 3 }]);
            let options = MaskOptions { turns, border: Border::Include, allow_empty: true };
            let tokens = TokenOptions { add_special_tokens: true, max_tokens: None };
            match tokenizer.mask(text, &options, tokens) {
                Ok(masked) => assert_eq!(masked.ids.len(), masked.mask.len()),
                Err(error) => {
                    assert!(matches!(error.status, Status::Format | Status::Unsupported), "{error}")
                }
            }
            None
        }
    };
    (status, bounds::processor_time() - start)
}

fn mutate(bytes: &mut Vec<u8>, seeds: &[String], random: &mut Rng) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(7) {
        0 => bytes.truncate(at),
        1 => bytes[at] = random.below(256) as u8,
        2 => drop(bytes.drain(at..bytes.len().min(at + 1 + random.below(30)))),
        3 => {
            let words = [
                "null",
                "true",
                "-1",
                "18446744073709551615",
                "1e308",
                "[]",
                "{}",
                "\"\"",
                "{99}",
                "\"ByteLevel\"",
                "\"Regex\":\"(a*)*b\"",
                "\u{0}",
                "0",
                "99999999",
            ];
            let word = words[random.below(words.len())];
            bytes.splice(at..at, word.bytes());
        }
        // A value takes the place of another.
        4 | 5 => {
            if let Ok(mut json) = serde_json::from_slice::<Value>(bytes) {
                let other: Value = serde_json::from_str(&seeds[random.below(seeds.len())]).unwrap();
                let from = random.below(count(&other));
                let value = nth(&mut other.clone(), from).clone();
                let to = random.below(count(&json));
                *nth(&mut json, to) = value;
                *bytes = json.to_string().into_bytes();
            }
        }
        _ => {
            let other = &seeds[random.below(seeds.len())].as_bytes();
            bytes.truncate(at);
            bytes.extend(&other[random.below(other.len())..]);
        }
    }
}

/// How many values a JSON value is made of, itself among them.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

fn nth(value: &mut Value, n: usize) -> &mut Value {
    if n == 0 {
        return value;
    }
    let mut left = n - 1;
    let inner: Vec<&mut Value> = match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => unreachable!("count says that there is one"),
    };
    for inner in inner {
        let size = count(inner);
        if left < size {
            return nth(inner, left);
        }
        left -= size;
    }
    unreachable!("count says that there is one")
}

/// Every kind of part that real files have.
fn seeds() -> Vec<Value> {
    let added = json!([{"id": 0, "content": "<|im_end|>", "single_word": false, "lstrip": true,
                        "rstrip": true, "normalized": false, "special": true}]);
    let pattern = r"\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]";
    let split = json!({"type": "Split", "behavior": "Isolated", "invert": false,
                       "pattern": {"Regex": pattern}});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": false});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    let file = |normalizer: Value, pre: Value, post: Value, model: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
               "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post,
               "decoder": null, "model": model})
    };
    let vocab =
        json!({"<|im_end|>": 0, "<s>": 1, "w": 2, "h": 3, "y": 4, "wh": 5, "why": 6, "?": 7});
    vec![
        file(
            json!(null),
            json!({"type": "Sequence", "pretokenizers": [split, byte_level]}),
            json!({"type": "Sequence", "processors": [byte_level, template]}),
            json!({"type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                   "byte_fallback": false, "ignore_merges": true, "vocab": vocab,
                   "merges": [["w", "h"], ["wh", "y"]]}),
        ),
        file(
            json!({"type": "Sequence", "normalizers": [
                {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                   "split": true}),
            json!({"type": "RobertaProcessing", "sep": ["<|im_end|>", 0], "cls": ["<s>", 1],
                   "trim_offsets": true, "add_prefix_space": false}),
            json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                   "vocab": [["<|im_end|>", 0.0], ["<s>", 0.0], ["▁", -1.0], ["w", -2.0],
                             ["hy", -3.5]]}),
        ),
        file(
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                   "strip_accents": null, "lowercase": true}),
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "BertProcessing", "sep": ["<|im_end|>", 0], "cls": ["<s>", 1]}),
            json!({"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 100, "vocab": vocab}),
        ),
        file(
            json!({"type": "Strip", "strip_left": true, "strip_right": false}),
            json!({"type": "FixedLength", "length": 3}),
            json!(null),
            json!({"type": "WordLevel", "unk_token": "?", "vocab": vocab}),
        ),
    ]
}
