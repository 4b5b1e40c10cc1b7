//! Sparse autoencoders: the one internal form that every format folds into, and opening files.
//!
//! A format's file in this folder ([`saelens`], [`gemma_scope`], …) finds its arrays and states its
//! [`Recipe`]; [`checkpoint`] folds them. Nothing outside knows how a checkpoint is laid out.
//! A new format adds its file and one line in [`FORMATS`].

mod array;
mod bare;
mod checkpoint;
mod columns;
mod config;
mod container;
mod convert;
mod dictionary_learning;
mod file;
mod found;
mod gemma_scope;
mod goodfire;
mod hook;
mod llama_scope;
mod named;
mod openmoss;
mod processing;
mod saelens;
mod site;
mod source;
mod sparsify;
mod tensors;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Result, bail};
use crate::tensor::DType;

use checkpoint::Checkpoint;
use source::Source;

pub(crate) use array::Array;
pub use array::Layout;
pub(crate) use container::Container;
pub(crate) use file::read_small;
pub use site::Site;
pub use tensors::SaeTensors;

/// How an SAE turns pre-activations into latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Architecture {
    /// z = relu(u)
    Standard = 0,
    /// z = u where u > threshold, else 0
    JumpRelu = 1,
    /// z = relu(e^r_mag g + b_mag) where g + b_gate > 0, else 0
    Gated = 2,
    /// z = relu(u) of the k largest u, else 0
    TopK = 3,
}

impl Architecture {
    pub fn from_code(code: i32) -> Option<Architecture> {
        use Architecture::*;
        [Standard, JumpRelu, Gated, TopK].into_iter().find(|a| *a as i32 == code)
    }

    pub fn from_name(name: &str) -> Option<Architecture> {
        use Architecture::*;
        [Standard, JumpRelu, Gated, TopK].into_iter().find(|a| a.name() == name)
    }

    /// The name in recipes and configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Standard => "standard",
            Architecture::JumpRelu => "jumprelu",
            Architecture::Gated => "gated",
            Architecture::TopK => "topk",
        }
    }
}

/// Which latents of a TopK SAE are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// The token's k largest, where they are above 0.
    #[default]
    Largest,
    /// The token's k largest in magnitude, with their signs: no relu.
    Magnitude,
    /// The largest of each of k equal groups, where it is above 0.
    Groups,
    /// The k · T largest of a whole batch of T tokens.
    Batch,
}

impl Selection {
    pub fn from_name(name: &str) -> Option<Selection> {
        use Selection::*;
        [Largest, Magnitude, Groups, Batch].into_iter().find(|s| s.name() == name)
    }

    /// The name in recipes and converted files.
    pub fn name(self) -> &'static str {
        match self {
            Selection::Largest => "largest",
            Selection::Magnitude => "magnitude",
            Selection::Groups => "groups",
            Selection::Batch => "batch",
        }
    }
}

/// What each token's hidden state x is normalised to before encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenNorm {
    #[default]
    None,
    /// x √d / ‖x‖
    Constant,
    /// (x − mean) / (σ + 1e-5), σ unbiased
    Layer,
}

impl TokenNorm {
    /// What SAELens adds to a token's standard deviation before it divides by it.
    pub const EPS: f64 = 1e-5;

    /// SAELens' name.
    pub fn name(self) -> &'static str {
        match self {
            TokenNorm::None => "none",
            TokenNorm::Constant => "constant_norm_rescale",
            TokenNorm::Layer => "layer_norm",
        }
    }
}

/// How a checkpoint was read: everything that changes a latent's value.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub format: &'static str,
    pub architecture: Architecture,
    pub d_in: usize,
    pub d_sae: usize,
    /// Active latents per token of a TopK SAE.
    pub k: Option<usize>,
    /// Which those are; `Largest` for all other SAEs.
    pub selection: Selection,
    /// The encoder's element type in the file; latents are computed in f32 from it.
    pub dtype: DType,
    /// b_dec is subtracted from hidden before encoding (folded into the bias).
    pub b_dec_subtracted: bool,
    /// Input normalisation as the file names it.
    pub normalization: String,
    /// The part of it that differs from token to token.
    pub token_norm: TokenNorm,
    /// Every token's mean over d is subtracted before anything else (folded into the rows).
    pub center_input: bool,
    /// Hidden is multiplied by this before encoding (folded into the rows).
    pub scale: f64,
    /// What decoder norms are divided by before they are folded; differs from `scale` in transcoders.
    pub output_scale: f64,
    /// Rows are scaled by the norm of their decoder row.
    pub decoder_norm_folded: bool,
    /// Thresholds, and the ranks of TopK, are for pre-activations times the norm of their decoder
    /// row; values are without it.
    pub threshold_on_decoder_norm: bool,
    /// Pre-activations are gated by the sigmoid of a second encoder.
    pub glu: bool,
    pub hook: Option<String>,
    /// Where the SAE reads. Never [`Site::BlockInput`] of a known block: that is the output of the
    /// block before, or the embedding.
    pub site: Site,
    /// 0-based decoder block in which the site lies: at [`Site::BlockOutput`] the one whose output
    /// is read. None of the embedding's.
    pub layer: Option<i64>,
    /// Index into Hugging Face's `hidden_states`; none if the site is no block boundary. (After
    /// the last block that list holds the output of the final norm instead: hook the block there.)
    pub hidden_states_index: Option<i64>,
    pub model: Option<String>,
}

/// Encoder rows of chosen latents, folded: u = a · (weight · h) + bias in h's own units, where a is
/// what [`TokenNorm`] divides the token by, or 1. Under layer norm, and of an SAE that reads centred
/// hidden states, the rows are centred, so that the token's mean drops out. Of a GLU encoder u is that times sigmoid(a · (glu.weight · h) + glu.bias).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncoderRows {
    pub d_in: usize,
    /// [K, d_in], one contiguous row per latent.
    pub weight: Vec<f32>,
    /// [K]; of a gated SAE the magnitude bias.
    pub bias: Vec<f32>,
    /// [K], at least 0; JumpReLU only.
    pub threshold: Option<Vec<f32>>,
    /// Gated only.
    pub gate: Option<GateRows>,
    /// Of a GLU encoder only.
    pub glu: Option<GluRows>,
    /// [K], TopK only: u times it is what places a latent among the others; absent means 1.
    pub rank_gain: Option<Vec<f32>>,
}

/// The gate path of a gated SAE: on where weight · h + bias > 0; the magnitude is scale · (weight · h).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GateRows {
    /// [K]
    pub bias: Vec<f32>,
    /// [K], e^r_mag.
    pub scale: Vec<f32>,
}

/// The second encoder of a GLU encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GluRows {
    /// [K, d_in], one contiguous row per latent.
    pub weight: Vec<f32>,
    /// [K]
    pub bias: Vec<f32>,
}

/// What the caller knows and the file may not say.
#[derive(Clone, Debug, Default)]
pub struct SaeOptions {
    /// Configuration keys that complete or override the file's own (the SAELens names).
    pub recipe: Option<Map<String, Value>>,
    /// sqrt(d) / mean ‖h‖, for a file that needs a scale and does not hold it.
    pub input_scale: Option<f64>,
}

/// An opened SAE: headers are read, rows are not.
pub struct Sae {
    path: Option<PathBuf>,
    recipe: Recipe,
    checkpoint: Checkpoint,
    /// The file's own configuration, for provenance.
    source_config: Option<Map<String, Value>>,
    /// Of a converted file: what it was converted from, and by what.
    converted: Option<Value>,
}

impl Sae {
    /// Opens a checkpoint: a file, or the folder in which its owner keeps it.
    pub fn open(path: impl AsRef<Path>, options: &SaeOptions) -> Result<Sae> {
        let path = path.as_ref();
        let found = detect(path, options)?;
        Ok(Sae {
            path: Some(path.to_path_buf()),
            recipe: found.recipe,
            checkpoint: found.checkpoint,
            source_config: Some(found.config),
            converted: found.converted,
        })
    }

    /// An SAE whose arrays the caller holds; they are copied.
    pub fn from_tensors(tensors: &SaeTensors<'_>) -> Result<Sae> {
        let (recipe, checkpoint) = tensors::adopt(tensors)?;
        Ok(Sae { path: None, recipe, checkpoint, source_config: None, converted: None })
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The file or folder, unless made from tensors.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How many latents a partial file holds; none if the whole dictionary is there.
    pub fn stored_latents(&self) -> Option<usize> {
        self.checkpoint.stored.as_ref().map(|stored| stored.ids.len())
    }

    /// Folded rows of the given latents.
    pub fn gather(&self, ids: &[u64]) -> Result<EncoderRows> {
        self.check_ids(ids)?;
        self.gather_by(&self.recipe, ids)
    }

    /// The same by another recipe; ids are below d_sae.
    pub(crate) fn gather_by(&self, recipe: &Recipe, ids: &[u64]) -> Result<EncoderRows> {
        self.checkpoint.gather(recipe, ids)
    }

    pub(crate) fn has_decoder(&self) -> bool {
        self.checkpoint.w_dec.is_some()
    }

    pub(crate) fn has_decoder_bias(&self) -> bool {
        self.checkpoint.b_dec.is_some()
    }

    /// Rows [K, d] that z is decoded with, by a recipe; none without a decoder.
    pub(crate) fn decoder_rows(&self, recipe: &Recipe, ids: &[u64]) -> Result<Option<Vec<f32>>> {
        self.checkpoint.decoder_rows(recipe, ids)
    }

    /// Unit decoder rows [K, d] of the given latents; none without a decoder.
    pub(crate) fn decoder_directions(&self, ids: &[u64]) -> Result<Option<Vec<f32>>> {
        self.check_ids(ids)?;
        self.checkpoint.decoder_directions(ids)
    }

    fn check_ids(&self, ids: &[u64]) -> Result<()> {
        for id in ids {
            if *id >= self.recipe.d_sae as u64 {
                bail!(LatentRange, "latent {id} does not exist: the SAE has {}", self.recipe.d_sae);
            }
        }
        Ok(())
    }

    /// [d]: what is added to the decoded latents; none without a decoder.
    pub(crate) fn decoder_bias(&self, recipe: &Recipe) -> Result<Option<Vec<f64>>> {
        self.checkpoint.decoder_bias(recipe)
    }

    /// The norms of the decoder's rows as the file has them: min, median, max, and how many are 0.
    /// Reads the whole decoder; null without one.
    pub fn decoder_norms(&self) -> Result<Value> {
        let Some(norms) = self.checkpoint.all_decoder_norms()? else { return Ok(Value::Null) };
        let zero = norms.iter().filter(|norm| **norm == 0.0).count();
        let mut report = summary(norms);
        report["zero"] = json!(zero);
        Ok(report)
    }

    /// sha256 of the whole weights file, in hexadecimal. `progress` hears (bytes done, of bytes).
    pub fn file_sha256(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<String> {
        let file = match self.checkpoint.files()[..] {
            [file] => file,
            [] => bail!(Unsupported, "an SAE made from tensors has no file to take the sha256 of"),
            [first, ..] => bail!(
                Unsupported,
                "{}: the SAE lies in several files, and no one sha256 is theirs; convert it to one",
                first.path().display()
            ),
        };
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0;
        file.will_stream(0, file.len());
        while done < file.len() {
            let part = buffer.len().min((file.len() - done) as usize);
            file.read_at(&mut buffer[..part], done)?;
            hash.update(&buffer[..part]);
            done += part as u64;
            progress(done, file.len());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The resolved recipe, for people and for programs.
    pub fn describe(&self) -> Result<Value> {
        let r = &self.recipe;
        let threshold = match self.checkpoint.thresholds()? {
            Some(all) => summary(all),
            None => Value::Null,
        };
        Ok(json!({
            "format": r.format,
            "architecture": r.architecture.name(),
            "d_in": r.d_in,
            "d_sae": r.d_sae,
            "k": r.k,
            "selection": (r.architecture == Architecture::TopK).then(|| r.selection.name()),
            "dtype": r.dtype.name(),
            "orientation": self.checkpoint.w_enc.layout().name(),
            "activation": r.architecture.name(),
            "b_dec_subtracted": r.b_dec_subtracted,
            "normalization": r.normalization,
            "center_input": r.center_input,
            "scale": r.scale,
            "output_scale": r.output_scale,
            "decoder_norm_folded": r.decoder_norm_folded,
            "threshold_on_decoder_norm": r.threshold_on_decoder_norm,
            "glu": r.glu,
            "threshold": threshold,
            "hook": r.hook,
            "site": r.site.name(),
            "layer": r.layer,
            "hidden_states_index": r.hidden_states_index,
            "model": r.model,
            "stored_latents": self.stored_latents(),
            "converted": self.converted,
        }))
    }
}

/// What a format's file hands over.
struct Opened {
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: Map<String, Value>,
    converted: Option<Value>,
}

/// How a format is recognised, and opened. The most specific come first; names of files and folders
/// find the weights, but their tensors decide.
type Format = (fn(&Source<'_>) -> bool, fn(&Source<'_>) -> Result<Opened>);
const FORMATS: [Format; 12] = [
    (goodfire::is_llama, goodfire::open_llama),
    (goodfire::is_r1, goodfire::open_r1),
    (named::is_openai, named::open_openai),
    (openmoss::matches, openmoss::open),
    (llama_scope::is_r1_distill, llama_scope::open_r1_distill),
    (llama_scope::matches, llama_scope::open),
    (sparsify::matches, sparsify::open),
    (dictionary_learning::matches, dictionary_learning::open),
    (gemma_scope::is_first, gemma_scope::open_first),
    (gemma_scope::is_second, gemma_scope::open_second),
    (named::is_matrices, named::open_matrices),
    (named::is_qresearch, named::open_qresearch),
];

fn detect(path: &Path, options: &SaeOptions) -> Result<Opened> {
    let saelens = saelens::folder_of(path);
    if let Some(folder) = saelens.as_ref().filter(|folder| saelens::is_complete(folder)) {
        return saelens::open(folder, options);
    }
    let source = Source::find(path, options)?;
    if let Some((_, open)) = FORMATS.iter().find(|(matches, _)| matches(&source)) {
        return open(&source);
    }
    match saelens.filter(|folder| saelens::is_configured(folder)) {
        Some(folder) if source.container.has("W_enc") => {
            saelens::open_container(&folder, &source.container, options)
        }
        Some(folder) => bail!(
            Io,
            "{}: cfg.json is there, but sae_weights.safetensors is missing, and {} is not it: it holds \
             {}",
            folder.display(),
            source.weights().display(),
            source.container.list()
        ),
        None if source.container.has("W_enc") => bare::open(source),
        None => bail!(
            Format,
            "{}: the tensors are those of no known format: the file holds {}. If it is an SAE, save its \
             encoder as W_enc and b_enc with the recipe, as SAELens names them",
            source.weights().display(),
            source.container.list()
        ),
    }
}

fn summary(mut all: Vec<f32>) -> Value {
    all.sort_by(f32::total_cmp);
    let (Some(min), Some(max)) = (all.first(), all.last()) else { return Value::Null };
    let middle = (all[(all.len() - 1) / 2] as f64 + all[all.len() / 2] as f64) / 2.0;
    json!({ "min": min, "median": middle, "max": max })
}
