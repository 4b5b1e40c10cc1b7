//! Containers against their twins, and hostile files (tests/data/pickles, whose note.json says what
//! must happen to each).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Container;
use crate::error::{Error, Status};
use crate::sae::array::Layout;
use crate::sae::source::matrix;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pickles")
}

/// All elements of a tensor, row-major, whatever the container.
fn elements(container: &Container, name: &str) -> Result<Vec<u8>, Error> {
    let array = container.need(name)?;
    match array.shape().len() {
        2 => {
            let rows: Vec<usize> = (0..array.shape()[0]).collect();
            matrix(array, Layout::LatentMajor)?.gather(&rows)
        }
        _ => array.bytes(),
    }
}

/// Opens a file and reads every tensor of it.
fn read_all(path: &Path) -> Result<Container, Error> {
    let container = Container::open(path)?;
    for entry in &container.entries {
        elements(&container, &entry.name)?;
    }
    Ok(container)
}

/// Of this thread, whatever else the machine does.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time that it is given.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "a clock of the thread");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// No file takes a hundredth of a second; what multiplies its work with every byte takes hours.
const PROCESSOR_SECONDS: f64 = 20.0;

#[test]
fn pickles_hold_what_their_owners_saved_or_are_refused() {
    let note: Value =
        serde_json::from_slice(&fs::read(folder().join("note.json")).unwrap()).unwrap();
    let (mut loaded, mut refused) = (0, 0);
    for (file, must) in note.as_object().unwrap() {
        let path = folder().join(file);
        let start = processor_seconds();
        let read = read_all(&path);
        let took = processor_seconds() - start;
        assert!(took < PROCESSOR_SECONDS, "{file} takes {took} s of the processor");
        match (must["must"].as_str().unwrap(), read) {
            ("loads", Ok(container)) => {
                compare(file, &container, must);
                loaded += 1;
            }
            ("loads", Err(error)) => panic!("{file}: {error}"),
            ("refused", Ok(_)) => panic!("{file} must be refused: {}", must["why"]),
            (_, Err(error)) => {
                assert!(error.message.contains(file), "{file} is not named: {error}");
                let data = matches!(
                    error.status,
                    Status::Format
                        | Status::UnsafePickle
                        | Status::Unsupported
                        | Status::TensorMissing
                );
                assert!(data, "{file}: {:?} {error}", error.status);
                refused += 1;
            }
            _ => {}
        }
    }
    assert!(loaded >= 15 && refused >= 80, "{loaded} loaded, {refused} refused");
}

fn compare(file: &str, container: &Container, must: &Value) {
    let twin = folder().join(file).with_extension("safetensors");
    let twin = Container::open(&twin).unwrap_or_else(|e| panic!("{file}: {e}"));
    let mut compared = 0;
    for name in must["tensors"].as_object().unwrap().keys() {
        assert_eq!(container.shape(name), twin.shape(name), "{file}: {name}");
        let (found, expected) = (elements(container, name), elements(&twin, name));
        assert_eq!(found.unwrap(), expected.unwrap(), "{file}: {name}");
        compared += 1;
    }
    assert!(compared > 0, "{file}");
    for (name, value) in must["values"].as_object().into_iter().flatten() {
        assert_eq!(container.value(name), Some(value), "{file}: {name}");
    }
}

/// What the readers must withstand: each attack has its files, and the test above opens them.
#[test]
fn every_known_attack_has_a_file() {
    let note: Value =
        serde_json::from_slice(&fs::read(folder().join("note.json")).unwrap()).unwrap();
    for attack in [
        "memo_bomb_lists",
        "memo_bomb_tuples",
        "memo_bomb_dicts",
        "memo_bomb_keys",
        "memo_bomb_tensors",
        "self_list",
        "self_dict",
        "huge_storage",
        "huge_size",
        "huge_expanded",
        "overlapping",
        "duplicate_member",
        "zip_bomb",
        "deflated_bomb",
        "deflated_wide",
        "deflated_dimensions",
        "dotdot_member",
        "dotdot_root",
        "absolute_root",
        "storage_key_path",
        "long1_255",
        "long1_short",
        "long4_huge",
        "deep_tuples",
        "deep_marks",
        "deep_dicts",
        "duplicate_key",
        "joined_key_twice",
        "numpy_array_again",
        "numpy_array_claims",
        "numpy_array_huge",
        "numpy_array_own_state",
        "numpy_scalar_short",
    ] {
        let file = note.as_object().unwrap().iter().find(|(name, _)| name.starts_with(attack));
        let (name, what) = file.expect(attack);
        assert!(folder().join(name).is_file(), "{name}");
        assert_ne!(what["must"], "loads", "{name}");
    }
}

#[test]
fn refusals_name_the_opcode_or_the_name() {
    for (file, named) in [
        ("global_os_system.pt", "os.system"),
        ("stack_global_os_system.pt", "system"),
        ("inst_os_system.pt", "INST"),
        ("ext1.pt", "EXT"),
        ("module.pt", "torch.nn.modules.linear.Linear"),
        ("numpy_objects.pt", "numpy.random"),
        ("legacy.pt", "before PyTorch 1.6"),
    ] {
        let error = Container::open(&folder().join(file)).err().expect(file);
        assert_eq!(error.status, Status::UnsafePickle, "{file}: {error}");
        assert!(error.message.contains(named), "{file}: {error}");
    }
}

/// Damaged at any byte, and cut anywhere, files are read or refused in bounded time.
#[test]
fn damage_is_never_more_than_an_error() {
    let formats = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats");
    let sources = [
        folder().join("by_hand.pt"),
        folder().join("zip64.pt"),
        formats.join("gemma_scope_deflated/layer_20/width_65k/canonical/params.npz"),
    ];
    let temp = tempfile::TempDir::new().unwrap();
    let path = temp.path().join("damaged.pt");
    for source in sources {
        let whole = fs::read(&source).unwrap();
        let step = (whole.len() / 150).max(1);
        for at in (0..whole.len()).step_by(step) {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= change;
                fs::write(&path, &bytes).unwrap();
                drop(read_all(&path));
            }
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read_all(&path).is_err(), "{} cut at {at} is read", source.display());
        }
    }
}
