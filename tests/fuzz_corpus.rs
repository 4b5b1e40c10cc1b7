//! The corpus of the fuzzers again, without the fuzzers: every input that ever reached new code of a
//! reader ends with an error or with rows, in time and in memory.
//!
//! tests/fuzz has the targets; `make fuzz` starts from this corpus and goes on.

#[path = "fuzz/src/archive.rs"]
#[allow(dead_code)] // The mutators use the rest.
mod archive;
#[path = "fuzz/src/bounds.rs"]
mod bounds;
#[path = "fuzz/src/caches.rs"]
#[allow(dead_code)]
mod caches;
#[path = "fuzz/src/targets.rs"]
#[allow(dead_code)]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

#[global_allocator]
static ALLOCATOR: bounds::Counting = bounds::Counting;

/// One test: the bounds count what the whole process allocates.
#[test]
fn inputs_stay_within_the_bounds() {
    for (name, target) in targets::TARGETS {
        let archive = fs::read(corpus().join(format!("{name}.zip"))).unwrap();
        let inputs = archive::unzip(&archive).unwrap();
        assert!(inputs.len() >= 50, "the corpus of {name} has {} inputs", inputs.len());
        for input in inputs {
            replay(&format!("{name}/{}", input.name), &input.bytes, target);
        }
    }
    // Hostile files by hand, for the readers as a whole.
    for path in files(&targets::data().join("pickles")) {
        replay(&path.display().to_string(), &fs::read(&path).unwrap(), targets::weights);
    }
    large_json();
    let caught = std::panic::catch_unwind(|| bounds::bounded(0, || drop(vec![1u8; 65 << 20])));
    assert!(caught.is_err(), "the bound on memory does not hold anything");
    let caught = std::panic::catch_unwind(|| bounds::bounded(0, spin));
    assert!(caught.is_err(), "the bound on time does not hold anything");
}

fn replay(name: &str, bytes: &[u8], target: fn(&[u8])) {
    let result = std::panic::catch_unwind(|| target(bytes));
    assert!(result.is_ok(), "{name} is the input");
}

/// Parsed JSON takes many times its text, so that only so much of it may be parsed: texts just below
/// the limits, and far above.
fn large_json() {
    for (kibibytes, element) in
        [(127, "0,"), (127, "[0],"), (511, "0,"), (511, "{},"), (1024, "0,"), (8192, "0,")]
    {
        let list = element.repeat((kibibytes << 10) / element.len() - 20);
        let list = list.trim_end_matches(',');
        let set = format!(r#"{{"K_neg": [], "K_pos": [{list}]}}"#);
        targets::latents(set.as_bytes());
        targets::folder(&[&[0, 0], set.as_bytes()].concat());
        for header in [set, format!(r#"{{"__metadata__": {{"a": "[{list}]"}}}}"#)] {
            let length = (header.len() as u64).to_le_bytes();
            targets::weights(&[&length[..], header.as_bytes()].concat());
        }
    }
}

fn spin() {
    let start = bounds::processor_time();
    while bounds::processor_time() - start <= bounds::TIME {}
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
