//! What one input does: the readers end with an error or with rows, within [`crate::bounds`].

use std::fs;
use std::path::{Path, PathBuf};

use blockem::latents::Latents;
use blockem::mask::{Border, MaskOptions, Turns};
use blockem::sae::{Sae, SaeOptions};
use blockem::tokenizer::{TokenOptions, Tokenizer};
use serde_json::json;
use tempfile::TempDir;

use crate::archive::{Member, zip};
use crate::bounds::bounded;
use crate::caches;

pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 7] = [
    ("weights", weights),
    ("pickle", pickle),
    ("folder", folder),
    ("latents", latents),
    ("index", index),
    ("tokenizer", tokenizer),
    ("cache", caches::cache),
];

/// Any bytes as a file of weights: safetensors, npz, PyTorch's zip.
pub fn weights(bytes: &[u8]) {
    let place = Place::new();
    let path = place.put("weights", bytes);
    // Words that lead past the keys that a bare file lacks.
    let recipe = json!({
        "architecture": "jumprelu", "apply_b_dec_to_input": false, "format": "qwen_scope", "k": 2,
        "dict_class": "BatchTopKSAE", "layout": "latent_major", "transcode": false,
        "reader": "saelens-compat", "act_fn": "jumprelu", "norm_activation": "inference",
        "sparsity_include_decoder_norm": true
    });
    let given = SaeOptions { recipe: recipe.as_object().cloned(), input_scale: None };
    for options in [SaeOptions::default(), given] {
        read(&path, &options, bytes.len());
    }
}

/// Any bytes as the pickle of a file of torch.save that has storages of a few sizes.
pub fn pickle(bytes: &[u8]) {
    let mut members = vec![Member::stored("archive/data.pkl", bytes)];
    for (key, len) in [24, 48, 4, 8, 96, 0].into_iter().enumerate() {
        members.push(Member::stored(&format!("archive/data/{key}"), &[0x3c; 96][..len]));
    }
    weights(&zip(&members));
}

/// A configuration beside weights. The input: which owner's folder, which of its valid weights, the
/// configuration up to a byte 0, and, if the weights are none of the valid ones, theirs.
pub fn folder(bytes: &[u8]) {
    let Some((&[layout, valid], text)) = bytes.split_first_chunk() else { return };
    let layout = &LAYOUTS[layout as usize % LAYOUTS.len()];
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    let (config, rest) = (&text[..end], text.get(end + 1..).unwrap_or_default());
    let place = Place::new();
    let weights = match layout.valid.get(valid as usize) {
        Some(name) => fs::read(data().join(name)).expect("a fixture is missing"),
        None => rest.to_vec(),
    };
    let mut input = weights.len() + config.len();
    let path = place.put(layout.weights, &weights);
    if let Some((name, fixture)) = layout.beside {
        let text = fs::read(data().join(fixture)).expect("a fixture is missing");
        input += text.len();
        place.put(name, &text);
    }
    let mut options = SaeOptions::default();
    match layout.config {
        Some(name) => drop(place.put(name, config)),
        None => options.recipe = serde_json::from_slice(config).ok(),
    }
    read(&path, &options, input);
    if layout.config.is_some() {
        read(place.0.path(), &options, input);
    }
}

/// Any bytes as K0.json.
pub fn latents(bytes: &[u8]) {
    bounded(bytes.len(), || {
        let Ok(set) = Latents::from_json(bytes) else { return };
        let again = Latents::from_json(set.to_json(None).to_string().as_bytes());
        let again = again.expect("what was written is not read");
        assert_eq!((again.ids(), again.signs()), (set.ids(), set.signs()));
        assert_eq!((again.weights(), again.provenance()), (set.weights(), set.provenance()));
    });
}

/// The files that an index is put beside, and the tensors of each.
pub const SHARDS: [(&str, &str, &[&str]); 2] = [
    ("model-00001-of-00002.safetensors", "sae/standard", &["W_enc", "b_enc", "W_dec", "b_dec"]),
    ("model-00002-of-00002.safetensors", "formats/openmoss_relu", &["W_E", "b_E", "W_D", "b_D"]),
];

/// Any bytes as the index of two files of weights.
pub fn index(bytes: &[u8]) {
    let place = Place::new();
    let mut input = bytes.len();
    for (name, folder, _) in SHARDS {
        let path = data().join(folder).join("sae_weights.safetensors");
        let shard = fs::read(path).expect("a fixture is missing");
        input += shard.len();
        place.put(name, &shard);
    }
    let config = fs::read(data().join("sae/standard/cfg.json")).expect("a fixture is missing");
    place.put("cfg.json", &config);
    let path = place.put("model.safetensors.index.json", bytes);
    let recipe = json!({"architecture": "standard", "layout": "input_major"});
    let options = SaeOptions { recipe: recipe.as_object().cloned(), input_scale: None };
    read(&path, &options, input);
    read(place.0.path(), &SaeOptions::default(), input);
}

/// Any bytes as tokenizer.json, which then takes a text. Builds without tokenizers refuse all.
pub fn tokenizer(bytes: &[u8]) {
    // A tokenizer may take thirty times its file, and its regular expressions what they like: small
    // files alone are bounded.
    bounded(64 * bytes.len(), || {
        let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return };
        let turns = Turns::Spans(vec![2..5, 7..9]);
        let options = MaskOptions { turns, border: Border::default(), allow_empty: true };
        drop(tokenizer.mask("a b\u{e9}\u{301} <|x|> 12", &options, TokenOptions::default()));
    });
}

/// Where an owner keeps the weights and the configuration; without `config` its keys are options.
pub struct Layout {
    weights: &'static str,
    config: Option<&'static str>,
    /// Another file of the folder, and where a valid one is.
    beside: Option<(&'static str, &'static str)>,
    /// Valid weights, below tests/data.
    pub valid: &'static [&'static str],
}

const fn layout(
    weights: &'static str,
    config: &'static str,
    valid: &'static [&'static str],
) -> Layout {
    Layout { weights, config: Some(config), beside: None, valid }
}

pub const LAYOUTS: [Layout; 10] = [
    layout(
        "sae_weights.safetensors",
        "cfg.json",
        &[
            "sae/standard/sae_weights.safetensors",
            "sae/topk/sae_weights.safetensors",
            "sae/gated/sae_weights.safetensors",
            "sae/jumprelu_bfloat16/sae_weights.safetensors",
        ],
    ),
    Layout {
        weights: "sae_weights.safetensors",
        config: Some("activation_scaler.json"),
        beside: Some(("cfg.json", "sae/gated_scaled/cfg.json")),
        valid: &["sae/gated_scaled/sae_weights.safetensors"],
    },
    layout(
        "layers.23/sae.safetensors",
        "layers.23/cfg.json",
        &["formats/sparsify_bf16/layers.23/sae.safetensors"],
    ),
    layout(
        "resid_post_layer_15/trainer_0/ae.pt",
        "resid_post_layer_15/trainer_0/config.json",
        &[
            "formats/dl_autoencoder/resid_post_layer_15/trainer_0/ae.pt",
            "formats/dl_batch_topk/resid_post_layer_15/trainer_0/ae.pt",
            "formats/dl_gated/resid_post_layer_15/trainer_0/ae.pt",
            "formats/dl_jumprelu/resid_post_layer_15/trainer_0/ae.pt",
            "formats/dl_matryoshka/resid_post_layer_15/trainer_0/ae.pt",
            "formats/dl_topk/resid_post_layer_15/trainer_0/ae.pt",
        ],
    ),
    layout(
        "L15R/checkpoints/final.safetensors",
        "L15R/hyperparams.json",
        &["formats/llama_scope/Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors"],
    ),
    layout(
        "sae_weights.safetensors",
        "config.json",
        &[
            "formats/openmoss_jumprelu/sae_weights.safetensors",
            "formats/openmoss_relu/sae_weights.safetensors",
            "formats/llama_scope_r1_distill/400M-Slimpajama-400M-OpenR1-Math-220k/L15R/sae_weights.safetensors",
            "formats/openmoss_glu/sae_weights.safetensors",
        ],
    ),
    layout(
        "resid_post/layer_5/params.safetensors",
        "resid_post/layer_5/config.json",
        &[
            "formats/gemma_scope_2/resid_post/layer_5_width_16k_l0_medium/params.safetensors",
            "formats/gemma_scope_square/layer_12/width_16k/average_l0_22/params.npz",
        ],
    ),
    layout(
        "L5.pt",
        "L5_cfg.json",
        &[
            "formats/ckkissane/gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
        ],
    ),
    layout("l37.pt", "config.json", &["formats/goodfire_r1_math/math/DeepSeek-R1-SAE-l37.pt"]),
    Layout {
        weights: "layer_3.sae",
        config: None,
        beside: None,
        valid: &[
            "sae/standard/sae_weights.safetensors",
            "formats/mwhanna_typo/layer_3.safetensors",
            "formats/qwen_scope_bf16/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/layer3.sae.pt",
            "formats/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
            "formats/openai_relu/gpt2-small/resid_delta_mlp_v4/autoencoders/6.pt",
        ],
    },
];

/// The configuration that a valid file of weights has beside it.
pub fn config_of(layout: &Layout, valid: &str) -> Option<Vec<u8>> {
    let weights = data().join(valid);
    let name = Path::new(layout.config?).file_name()?;
    let folder = weights.parent()?;
    let own = format!("{}_cfg.json", weights.file_stem()?.to_str()?);
    let places = [folder.join(name), folder.parent()?.join(name), folder.join(own)];
    places.into_iter().find_map(|path| fs::read(path).ok())
}

/// tests/data, wherever the tests run.
pub fn data() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let data = here.join("tests/data");
    if data.is_dir() { data } else { here.join("../data") }
}

/// Opens an SAE and takes its first and last latent.
fn read(path: &Path, options: &SaeOptions, input: usize) {
    bounded(input, || {
        let Ok(sae) = Sae::open(path, options) else { return };
        let last = sae.recipe().d_sae as u64 - 1;
        drop((sae.gather(&[0, last]), sae.describe()));
    });
}

/// A folder for one input, in memory where the system has a place for that.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Place {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        Place(made.expect("cannot make a folder"))
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    pub fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        let folder = path.parent().unwrap_or(self.0.path());
        fs::create_dir_all(folder).expect("cannot make a folder");
        fs::write(&path, bytes).expect("cannot write a file");
        path
    }
}
