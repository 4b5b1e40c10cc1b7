//! Any bytes as a latent set (K0.json), and as the recipe of a small SAE.
#![no_main]

use blockem::latents::Latents;
use blockem::sae::{Sae, SaeOptions};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(set) = Latents::from_json(bytes) {
        let again = Latents::from_json(set.to_json(None).to_string().as_bytes()).unwrap();
        assert_eq!((again.ids(), again.signs()), (set.ids(), set.signs()));
    }
    if let Ok(serde_json::Value::Object(recipe)) = serde_json::from_slice(bytes) {
        let file =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../data/sae/standard/sae_weights.safetensors");
        let options = SaeOptions { recipe: Some(recipe), input_scale: None };
        let copy = std::env::temp_dir().join("blockem-fuzz-bare.safetensors");
        if !copy.exists() {
            let _ = std::fs::copy(file, &copy);
        }
        if let Ok(sae) = Sae::open(&copy, &options) {
            let _ = sae.gather(&[0]);
        }
    }
});
