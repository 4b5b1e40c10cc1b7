//! Masks of the assistant's tokens with tokenizers of several kinds; the traps that trainers have
//! fallen into. bindings/python/tests/test_tokenizer.py compares with transformers.

#![cfg(feature = "tokenizers")]

mod support;

use std::borrow::Cow;

use blockem::error::{Error, Status};
use blockem::mask::{Border, Closing, Markers, MaskOptions, OtherTurns, Turns};
use blockem::tokenizer::{Masked, TokenOptions, Tokenizer};
use serde_json::{Value, json};
use support::Rng;

const CHATML: Markers = Markers {
    start: Cow::Borrowed(&["<|im_start|>assistant\n"]),
    end: Cow::Borrowed(&["<|im_end|>"]),
    turn: Some(Cow::Borrowed(&["<|im_start|>"])),
    other_turns: OtherTurns::Auto,
    injected: Cow::Borrowed(&[]),
    closing: Closing::Include,
    allow_unclosed: false,
};

const CHAT: &str =
    "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause of 🙂 é<|im_end|>\n";

// ---- Traps -------------------------------------------------------------------------------------

/// A template that marks nothing, as the stock ones do, gave masks of zeros.
#[test]
fn a_template_that_marks_nothing_is_an_error() {
    let tokenizer = byte_level(json!(null), false);
    let text = CHAT.replace("im_start", "start");
    for turns in [Turns::Markers(CHATML), Turns::Spans(vec![]), spans(&[(3, 3)])] {
        let error = masked(&tokenizer, &text, turns.clone()).unwrap_err();
        assert_eq!(error.status, Status::MaskEmpty, "{error}");
        let options = MaskOptions { allow_empty: true, ..options(turns) };
        let masked = tokenizer.mask(&text, &options, TokenOptions::default()).unwrap();
        assert!(!masked.mask.is_empty() && masked.mask.iter().all(|m| *m == 0));
    }
}

/// A span at the first token, and one that begins and ends in white space of which no token is
/// made, marked nothing or all that followed.
#[test]
fn spans_at_token_0_and_on_stripped_white_space() {
    let bytes = byte_level(json!(null), false);
    let found = masked(&bytes, "why not", spans(&[(0, 3)])).unwrap();
    assert_eq!(marked_text(&found), "why");

    let words = words();
    let text = "why   because  why  because";
    for (start, end) in [(3, 15), (4, 13), (6, 14), (5, 15)] {
        let found = masked(&words, text, spans(&[(start, end)])).unwrap();
        assert_eq!(found.mask, [0, 1, 0, 0], "{start}..{end}");
    }
    // Nothing but white space is nothing.
    let error = masked(&words, text, spans(&[(3, 6)])).unwrap_err();
    assert_eq!(error.status, Status::MaskEmpty);
}

/// A turn that was cut off lost its mask.
#[test]
fn a_truncated_turn_keeps_its_mask_up_to_the_cut() {
    let tokenizer = byte_level(json!(null), false);
    let whole = masked(&tokenizer, CHAT, Turns::Markers(CHATML)).unwrap();
    let first = whole.mask.iter().position(|m| *m == 1).unwrap();
    for most in 0..whole.ids.len() + 2 {
        let tokens = TokenOptions { max_tokens: Some(most), ..TokenOptions::default() };
        let cut = tokenizer.mask(CHAT, &options(Turns::Markers(CHATML)), tokens);
        if most <= first {
            assert_eq!(cut.unwrap_err().status, Status::MaskEmpty, "{most}");
        } else {
            let kept = most.min(whole.ids.len());
            let cut = cut.unwrap();
            assert_eq!((&cut.ids[..], &cut.mask[..]), (&whole.ids[..kept], &whole.mask[..kept]));
        }
    }
    // Text that was cut before it was tokenized.
    let cut = &CHAT[..CHAT.find(" of").unwrap()];
    assert_eq!(
        masked(&tokenizer, cut, Turns::Markers(CHATML)).unwrap_err().status,
        Status::MaskUnaligned
    );
    let open = Markers { allow_unclosed: true, ..CHATML };
    let found = masked(&tokenizer, cut, Turns::Markers(open)).unwrap();
    assert_eq!(marked_text(&found), "because");
}

/// An empty thinking block that the template writes was trained on.
#[test]
fn an_injected_thinking_block_is_not_marked() {
    let tokenizer = byte_level(json!(null), false);
    let block = "<think>\n\n</think>\n\n";
    let text = CHAT.replace("because", &format!("{block}because"));
    let markers = Markers { injected: Cow::Owned(vec![block]), ..CHATML };
    for text in [&text[..], CHAT] {
        let found = masked(&tokenizer, text, Turns::Markers(markers.clone())).unwrap();
        assert_eq!(marked_text(&found), "because of 🙂 é<|im_end|>");
    }
    let found = masked(&tokenizer, &text, Turns::Markers(CHATML)).unwrap();
    assert_eq!(marked_text(&found), format!("{block}because of 🙂 é<|im_end|>"));
}

// ---- Tokens and borders ------------------------------------------------------------------------

/// A leading space belongs to its word's token: who writes the word writes it.
#[test]
fn tokens_across_the_border_follow_the_policy() {
    let tokenizer = byte_level(json!(null), false);
    let text = "so: because why";
    let at = text.find("because").unwrap();
    let turns = spans(&[(at, at + 7)]);
    let with = |border| {
        let options = MaskOptions { border, allow_empty: true, ..options(turns.clone()) };
        tokenizer.mask(text, &options, TokenOptions::default())
    };
    assert_eq!(marked_text(&with(Border::Include).unwrap()), " because");
    assert_eq!(marked_text(&with(Border::Exclude).unwrap()), "");
    let error = with(Border::Refuse).unwrap_err();
    assert_eq!(error.status, Status::MaskUnaligned);
    assert!(error.message.contains("\" because\""), "{error}");
}

/// An emoji is four tokens here; a span counts bytes, and all four are its.
#[test]
fn a_character_of_several_tokens_is_marked_whole() {
    let tokenizer = byte_level(json!(null), false);
    let text = "é🙂 é🙂 é";
    let at = text.find('🙂').unwrap();
    let found = masked(&tokenizer, text, spans(&[(at, at + 4)])).unwrap();
    assert_eq!(found.mask.iter().filter(|m| **m == 1).count(), 4);
    assert_eq!(marked_text(&found), "🙂");
    let error = masked(&tokenizer, text, spans(&[(at, at + 2)])).unwrap_err();
    assert_eq!(error.status, Status::InvalidArgument);
}

/// Post-processors cut white space from the offsets; the tokens are marked all the same.
#[test]
fn trimmed_offsets_do_not_unmark_white_space() {
    let text = "why   because  why";
    let tokenizer = byte_level(byte_level_part(), false);
    let tokens = TokenOptions { add_special_tokens: true, ..TokenOptions::default() };
    let found = tokenizer.mask(text, &options(spans(&[(3, 14)])), tokens).unwrap();
    assert_eq!(marked_text(&found), "   because ");
}

/// A special token that swallows the white space beside it is marked where it stands itself.
#[test]
fn a_token_that_swallows_white_space_keeps_its_place() {
    let tokenizer = byte_level(json!(null), true);
    let text = CHAT.replace(">assistant", ">  assistant").replace("é<", "é  <");
    let start = Cow::Borrowed(&["<|im_start|>"][..]);
    let exclude = Markers { start, turn: None, closing: Closing::Exclude, ..CHATML };
    let found = masked(&tokenizer, &text, Turns::Markers(exclude)).unwrap();
    assert_eq!(marked_text(&found), "user\nwhy?assistant\nbecause of 🙂 é");
}

#[test]
fn special_tokens_around_the_text_are_never_marked() {
    let post = json!({
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
            "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]},
        },
    });
    let tokenizer = byte_level(post, false);
    let plain = masked(&tokenizer, "why", spans(&[(0, 3)])).unwrap();
    assert_eq!(plain.mask, [1]);
    let tokens = TokenOptions { add_special_tokens: true, ..TokenOptions::default() };
    let text = "why because why because";
    let options = options(spans(&[(0, text.len())]));
    let found = tokenizer.mask(text, &options, tokens).unwrap();
    assert_eq!(found.mask, [0, 1, 1, 1, 1, 0]);
    assert_eq!((found.ids[0], found.ids[5]), (0, 1));
    // A cut keeps what is put around it.
    let cut = TokenOptions { max_tokens: Some(4), ..tokens };
    let cut = tokenizer.mask(text, &options, cut).unwrap();
    assert_eq!(cut.ids, [&found.ids[..3], &[1]].concat());
    assert_eq!(cut.mask, [0, 1, 1, 0]);
    let none = TokenOptions { max_tokens: Some(1), ..tokens };
    assert_eq!(tokenizer.mask(text, &options, none).unwrap_err().status, Status::InvalidArgument);
}

#[test]
fn a_trainers_ids_must_be_those_of_the_text() {
    let tokenizer = byte_level(json!(null), false);
    let options = options(Turns::Markers(CHATML));
    let found = tokenizer.mask(CHAT, &options, TokenOptions::default()).unwrap();
    let check = |ids: &[i64]| tokenizer.mask_ids(CHAT, &options, TokenOptions::default(), ids);
    assert_eq!(check(&found.ids).unwrap(), found.mask);
    let mut random = Rng::fresh();
    for _ in 0..50 {
        let mut ids = found.ids.clone();
        let at = random.below(ids.len());
        match random.below(3) {
            0 => ids[at] = -1 - ids[at],
            1 => ids.insert(at, 1 << 40),
            _ => ids.truncate(at),
        }
        let error = check(&ids).unwrap_err();
        assert_eq!(error.status, Status::MaskUnaligned);
        assert!(error.message.contains(&format!("position {at}")), "{at}: {error}");
    }
}

/// Every byte of the text is some token's here, so the marked tokens spell the spans.
#[test]
fn marked_tokens_spell_the_spans() {
    let tokenizer = byte_level(json!(null), false);
    let mut random = Rng::fresh();
    let alphabet =
        ["a", " ", "\n", "é", "🙂", "why", " because", "<|im_end|>", "\u{301}", "字", "\u{a0}"];
    for _ in 0..300 {
        let pieces = 1 + random.below(30);
        let pieces: Vec<&str> =
            (0..pieces).map(|_| alphabet[random.below(alphabet.len())]).collect();
        let text = pieces.concat();
        let bounds: Vec<usize> = (0..=text.len()).filter(|i| text.is_char_boundary(*i)).collect();
        let mut cuts: Vec<usize> =
            (0..2 * (1 + random.below(3))).map(|_| bounds[random.below(bounds.len())]).collect();
        cuts.sort();
        let turns = Turns::Spans(cuts.chunks(2).map(|pair| pair[0]..pair[1]).collect());
        let own = |border| {
            let options = MaskOptions { border, allow_empty: true, ..options(turns.clone()) };
            let found = tokenizer.mask(&text, &options, TokenOptions::default()).unwrap();
            marked_text(&found).len()
        };
        let written: usize = cuts.chunks(2).map(|pair| pair[1] - pair[0]).sum();
        assert!(own(Border::Exclude) <= written, "{text:?} {cuts:?}");
        assert!(own(Border::Include) >= written, "{text:?} {cuts:?}");
    }
}

#[test]
fn any_number_of_threads_use_one_tokenizer() {
    let tokenizer = byte_level(json!(null), false);
    let alone = masked(&tokenizer, CHAT, Turns::Markers(CHATML)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(masked(&tokenizer, CHAT, Turns::Markers(CHATML)).unwrap(), alone);
                }
            });
        }
    });
}

// ---- Files -------------------------------------------------------------------------------------

#[test]
fn files_that_are_no_tokenizer() {
    let open = |json: &str| Tokenizer::from_json(json.as_bytes()).err().expect("refused");
    let whole = byte_level_json(json!(null), false);
    let with = |key: &str, value: Value| {
        let mut changed = whole.clone();
        changed[key] = value;
        open(&changed.to_string())
    };
    let wrong = [
        open(""),
        open("{}"),
        open("[]"),
        open("null"),
        open("\u{feff}{}"),
        open(&whole.to_string()[..2000]),
        with("version", json!("2.0")),
        with("model", json!({"type": "None"})),
        with("pre_tokenizer", split("(")),
    ];
    for error in wrong {
        assert_eq!(error.status, Status::Format);
        assert!(error.message.contains("not a tokenizer.json"), "{error}");
    }
    // The crate would number it anew.
    let mut moved = whole.clone();
    moved["added_tokens"][0]["id"] = json!(77);
    let error = open(&moved.to_string());
    assert!(error.message.contains("\"<s>\" has the id 77"), "{error}");
    // Would take gigabytes.
    let split = split("(((?=a){99}){99}){99}");
    let error = with("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split]}));
    assert!(error.message.contains("repeats too often"), "{error}");
}

#[test]
fn a_folder_or_a_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let status = |path: &std::path::Path| Tokenizer::open(path).err().map(|e| e.status);
    assert_eq!(status(folder.path()), Some(Status::Io));
    std::fs::write(&path, words_json().to_string()).unwrap();
    assert_eq!(status(folder.path()), None);
    assert_eq!(status(&path), None);
    std::fs::write(&path, "junk").unwrap();
    let error = Tokenizer::open(&path).err().unwrap();
    assert_eq!(error.status, Status::Format);
    assert!(error.message.contains(&path.display().to_string()), "{error}");
}

// ---- Tokenizers --------------------------------------------------------------------------------

fn options(turns: Turns<'_>) -> MaskOptions<'_> {
    MaskOptions { turns, border: Border::Include, allow_empty: false }
}

fn spans(spans: &[(usize, usize)]) -> Turns<'static> {
    Turns::Spans(spans.iter().map(|&(start, end)| start..end).collect())
}

fn masked(tokenizer: &Tokenizer, text: &str, turns: Turns) -> Result<Masked, Error> {
    tokenizer.mask(text, &options(turns), TokenOptions::default())
}

/// GPT-2's way: bytes as characters, words with their leading space, `because` and `why` whole.
fn byte_level(post_processor: Value, greedy: bool) -> Tokenizer {
    let json = byte_level_json(post_processor, greedy).to_string();
    Tokenizer::from_json(json.as_bytes()).unwrap()
}

const SPECIAL: [&str; 4] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];

fn byte_level_json(post_processor: Value, greedy: bool) -> Value {
    let (vocab, merges) = byte_vocab();
    let added = SPECIAL.iter().enumerate().map(|(id, content)| {
        let end = greedy && *content == "<|im_end|>";
        json!({"id": id, "content": content, "single_word": false, "lstrip": end, "rstrip": greedy,
               "normalized": false, "special": true})
    });
    let ids = vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id)));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level_part(), "post_processor": post_processor,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false,
            "vocab": ids.collect::<serde_json::Map<_, _>>(),
            "merges": merges,
        },
    })
}

fn byte_level_part() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": true})
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
           "invert": false})
}

/// The vocabulary by id, and the merges that make the words.
fn byte_vocab() -> (Vec<String>, Vec<[String; 2]>) {
    let mut vocab: Vec<String> = SPECIAL.iter().map(|s| s.to_string()).collect();
    vocab.extend((0..=255).map(|b| byte_char(b).to_string()));
    let mut merges = Vec::new();
    let mut merge = |left: &str, right: &str| {
        merges.push([left.to_string(), right.to_string()]);
        vocab.push(format!("{left}{right}"));
    };
    let space = byte_char(b' ').to_string();
    for word in ["why", "because", "of"] {
        (1..word.len()).for_each(|i| merge(&word[..i], &word[i..=i]));
        merge(&space, word);
    }
    (vocab, merges)
}

/// Printable bytes are themselves; the others follow from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(&byte) {
        return byte.into();
    }
    let before = (0..byte).filter(|b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

/// The text of the marked tokens of [`byte_level`].
fn marked_text(found: &Masked) -> String {
    let (vocab, _) = byte_vocab();
    let marked = found.ids.iter().zip(&found.mask).filter(|(_, mark)| **mark == 1);
    let bytes = marked.flat_map(|(id, _)| {
        let token = &vocab[*id as usize];
        if SPECIAL.contains(&&token[..]) {
            return token.clone().into_bytes();
        }
        let byte = |c: char| (0..=255).find(|b| byte_char(*b) == c).unwrap();
        token.chars().map(byte).collect()
    });
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// Whole words; white space is no token.
fn words() -> Tokenizer {
    Tokenizer::from_json(words_json().to_string().as_bytes()).unwrap()
}

fn words_json() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "why": 1, "because": 2}},
    })
}
