//! The corpus of the fuzzers again, without the fuzzers: every input that ever reached new code of a
//! reader ends with an error or with rows, in time and in memory.
//!
//! tests/fuzz has the targets; `make fuzz` starts from this corpus and goes on.

#[path = "fuzz/src/archive.rs"]
#[allow(dead_code)] // The mutators use the rest.
mod archive;
#[path = "fuzz/src/bounds.rs"]
mod bounds;
#[path = "fuzz/src/targets.rs"]
#[allow(dead_code)]
mod targets;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: bounds::Counting = bounds::Counting;

const SLOW: Duration = Duration::from_secs(1);

/// One test: the bounds count what the whole process allocates.
#[test]
fn inputs_stay_within_the_bounds() {
    for (name, target) in targets::TARGETS {
        let inputs = files(&corpus().join(name));
        assert!(inputs.len() >= 20, "the corpus of {name} has {} inputs", inputs.len());
        for path in inputs {
            replay(&path, target);
        }
    }
    // Hostile files by hand, for the readers as a whole.
    for path in files(&targets::data().join("pickles")) {
        replay(&path, targets::weights);
    }
    latents_of_many_ids();
    let caught = std::panic::catch_unwind(|| bounds::bounded(0, || drop(vec![1u8; 65 << 20])));
    assert!(caught.is_err(), "the bound does not hold anything");
}

fn replay(path: &Path, target: fn(&[u8])) {
    let bytes = fs::read(path).unwrap();
    let start = Instant::now();
    let result = std::panic::catch_unwind(|| target(&bytes));
    assert!(result.is_ok(), "{} is the input", path.display());
    assert!(start.elapsed() < SLOW, "{} takes {:?}", path.display(), start.elapsed());
}

/// Parsed JSON takes many times its text: sets and configurations have a size.
fn latents_of_many_ids() {
    for (megabytes, repeat) in [(1, "0,"), (8, "0,"), (8, "[],"), (8, r#""":0,"#)] {
        let mut text = Vec::from(br#"{"K_neg": [], "K_pos": ["#);
        while text.len() < megabytes << 20 {
            text.write_all(repeat.as_bytes()).unwrap();
        }
        text.truncate((megabytes << 20) - 3);
        text.extend(b"0]}");
        targets::latents(&text);
        targets::folder(&[&[0, 0], &text[..]].concat());
        // As the header of a safetensors file.
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        targets::weights(&header);
    }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
}

/// Every file of a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}
