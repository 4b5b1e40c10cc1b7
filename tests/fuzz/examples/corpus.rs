//! The inputs that the fuzzers start from, one folder each:
//!
//! ```text
//! corpus unpack FOLDER    the committed corpus and the files under tests/data
//! corpus pack FOLDER      becomes the committed corpus
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use blockem_fuzz::archive::{Member, unzip, zip};
use blockem_fuzz::targets::{LAYOUTS, TARGETS, config_of, data};

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

/// Every file below a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("cannot list a folder");
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.expect("cannot list a folder").path()).collect();
    paths.sort();
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    paths.into_iter().flat_map(below).collect()
}
