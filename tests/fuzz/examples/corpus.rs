//! The inputs that the fuzzers start from, one folder each:
//!
//! ```text
//! corpus unpack FOLDER    the committed corpus and the files under tests/data
//! corpus pack FOLDER      becomes the committed corpus
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use blockem_fuzz::archive::{Member, unzip, zip};
use blockem_fuzz::caches;
use blockem_fuzz::targets::{LAYOUTS, SHARDS, TARGETS, config_of, data};
use serde_json::{Map, Value, json};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["unpack", folder] => unpack(Path::new(folder)),
        ["pack", folder] => pack(Path::new(folder)),
        _ => panic!("corpus unpack FOLDER, or corpus pack FOLDER"),
    }
}

fn committed(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{target}.zip"))
}

fn pack(from: &Path) {
    for (target, _) in TARGETS {
        let inputs = files(&from.join(target)).into_iter().enumerate().map(|(i, path)| Member {
            name: i.to_string(),
            bytes: fs::read(&path).expect("cannot read an input"),
            deflated: true,
        });
        let archive = zip(&inputs.collect::<Vec<_>>());
        fs::write(committed(target), archive).expect("cannot write the corpus");
    }
}

fn unpack(out: &Path) {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = out.join(target);
        fs::create_dir_all(&folder).expect("cannot make a folder");
        fs::write(folder.join(name), bytes).expect("cannot write a seed");
    };
    for (target, _) in TARGETS {
        let archive = fs::read(committed(target)).unwrap_or_default();
        for input in unzip(&archive).unwrap_or_default() {
            write(target, &format!("kept-{}", input.name), &input.bytes);
        }
    }
    for (i, path) in files(&data()).iter().enumerate() {
        let name = format!("seed-{i}");
        let bytes = fs::read(path).expect("cannot read a fixture");
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        match extension {
            "pt" | "pth" | "npz" | "safetensors" => write("weights", &name, &bytes),
            "json" => write("folder", &name, &[&[9, 0], &bytes[..]].concat()),
            _ => {}
        }
        let members = unzip(&bytes).unwrap_or_default();
        if let Some(pickle) = members.iter().find(|m| m.name.ends_with("data.pkl")) {
            write("pickle", &name, &pickle.bytes);
        }
    }
    for (l, layout) in LAYOUTS.iter().enumerate() {
        for (v, valid) in layout.valid.iter().enumerate() {
            let config = config_of(layout, valid).unwrap_or(b"{}".to_vec());
            write(
                "folder",
                &format!("valid-{l}-{v}"),
                &[&[l as u8, v as u8], &config[..]].concat(),
            );
            let weights = fs::read(data().join(valid)).expect("cannot read a fixture");
            let given = [&[l as u8, 0xff], &config[..], &[0], &weights].concat();
            write("folder", &format!("given-{l}-{v}"), &given);
        }
    }
    let names = fs::read(data().join(SHARDS[0].1).join("sae_weights.safetensors"));
    let weights = names.expect("cannot read a fixture");
    for (i, prefix) in ["_orig_mod.", "module.", "model._orig_mod."].into_iter().enumerate() {
        write("weights", &format!("prefixed-{i}"), &prefixed(&weights, prefix));
    }
    for (i, text) in indexes().iter().enumerate() {
        write("index", &format!("seed-{i}"), text.as_bytes());
    }
    for (i, seed) in caches::seeds().iter().enumerate() {
        write("cache", &format!("seed-{i}"), seed);
    }
    for (i, text) in TOKENIZERS.iter().enumerate() {
        write("tokenizer", &format!("seed-{i}"), text.as_bytes());
    }
    for (i, text) in LATENTS.iter().enumerate() {
        write("latents", &format!("seed-{i}"), text.as_bytes());
    }
}

const LATENTS: [&str; 4] = [
    r#"{"K_pos": [1, 5], "K_neg": [7]}"#,
    r#"{"K_pos": [], "K_neg": [0, 65535], "weights": {"0": 0.5, "65535": 2}, "note": "mine"}"#,
    r#"{"K_pos": [3], "K_neg": [], "blockem": {"d_in": 4, "d_sae": 9, "identity": "0a",
        "activation": "native", "layer": 19, "sae_sha256": "ff"}}"#,
    r#"{"K_pos": [3, 3], "K_neg": [-1], "weights": {"3": null}, "blockem": {}}"#,
];

/// A safetensors file with every name below another.
fn prefixed(weights: &[u8], prefix: &str) -> Vec<u8> {
    let (length, rest) = weights.split_first_chunk::<8>().expect("a fixture is too short");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).expect("a fixture is damaged");
    let named = header.into_iter().map(|(name, info)| match &name[..] {
        "__metadata__" => (name, info),
        _ => (format!("{prefix}{name}"), info),
    });
    let text = Value::Object(named.collect()).to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), data].concat()
}

/// Indexes of the shards, sound and not.
fn indexes() -> Vec<String> {
    let of = |map: Value| json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    let mut map = Map::new();
    for (file, _, tensors) in SHARDS {
        map.extend(tensors.iter().map(|name| (name.to_string(), json!(file))));
    }
    let one = json!({"W_enc": SHARDS[0].0});
    let both = json!({"W_enc": SHARDS[0].0, "W_E": SHARDS[1].0});
    let outside = json!({"W_enc": "../outside"});
    [Value::Object(map), one, both, outside, json!({}), json!([])].map(of).to_vec()
}

/// One of each kind of model.
const TOKENIZERS: [&str; 4] = [
    r#"{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"},
        "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}"#,
    r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\p{L}{1,3}"},
        "behavior": "Isolated", "invert": false}, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 3, "content": "<|x|>", "single_word": false, "lstrip": true,
        "rstrip": true, "normalized": false, "special": true}]}"#,
    r#"{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}"#,
    r###"{"model": {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9, "vocab": {"?": 0, "a": 1}}, "post_processor":
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {}}}"###,
];

/// Every file below a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("cannot list a folder");
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.expect("cannot list a folder").path()).collect();
    paths.sort();
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    paths.into_iter().flat_map(below).collect()
}
