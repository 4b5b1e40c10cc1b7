//! Any bytes as a file of weights: safetensors, npz, PyTorch's zip and the pickle in it. Opening it
//! and gathering rows ends with an error or with rows, never otherwise.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, Write};
use std::path::PathBuf;

use blockem::sae::{Sae, SaeOptions};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

thread_local! {
    /// One file in memory, written over and over.
    static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new_in("/dev/shm").unwrap());
}

/// Recipes that lead past the keys that a bare file lacks.
fn options() -> [SaeOptions; 2] {
    let recipe = serde_json::json!({
        "architecture": "jumprelu", "apply_b_dec_to_input": false, "format": "qwen_scope", "k": 2,
        "dict_class": "BatchTopKSAE", "layout": "latent_major", "transcode": false
    });
    let given = recipe.as_object().cloned();
    [SaeOptions::default(), SaeOptions { recipe: given, input_scale: None }]
}

fuzz_target!(|bytes: &[u8]| {
    let path: PathBuf = FILE.with_borrow_mut(|file| {
        let inner = file.as_file_mut();
        inner.set_len(0).unwrap();
        inner.rewind().unwrap();
        inner.write_all(bytes).unwrap();
        file.path().to_path_buf()
    });
    for options in options() {
        if let Ok(sae) = Sae::open(&path, &options) {
            let last = sae.recipe().d_sae as u64 - 1;
            let _ = sae.gather(&[0, last]);
            let _ = sae.describe();
        }
    }
});
