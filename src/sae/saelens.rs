//! SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, from any version of the library.
//!
//! `W_enc` is [d_in, d_sae] here, always. The rules that the keys state are also those of a bare
//! file ([`super::bare`]), which uses the same names. The architectures of SAELens:
//!
//! ```text
//! standard, transcoder, skip_transcoder      z = relu(u)           transcoders subtract no b_dec
//! jumprelu, jumprelu_(skip_)transcoder       z = u where u > threshold
//! gated                                      as Architecture::Gated
//! topk, abstopk                              u times the decoder's norm if rescale_acts_by_decoder_norm;
//!                                            the k largest above 0, or the k largest in magnitude
//! batchtopk, matryoshka_batchtopk            a training checkpoint: z = n u where n u > topk_threshold,
//!                                            n the decoder's norms if rescale_acts_by_decoder_norm,
//!                                            which is what SAELens saves as jumprelu in the end
//! ```

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result, Status, bail};

use super::array::{Array, Layout, Matrix};
use super::checkpoint::{Checkpoint, GateArrays, GluArrays, StoredLatents};
use super::config::Config;
use super::container::Container;
use super::found::{calibrated, check_k, exp, repeated, scalar};
use super::processing::center_input;
use super::site::{Place, Site, Stated};
use super::source::matrix;
use super::{Architecture, Opened, Recipe, SaeOptions, Selection, TokenNorm};

const CONFIG: &str = "cfg.json";
const WEIGHTS: &str = "sae_weights.safetensors";
const SCALER: &str = "activation_scaler.json";
const SCALED: &str = "expected_average_only_in";

/// The SAELens folder that a path means: the folder itself, or one of its two files.
pub(super) fn folder_of(path: &Path) -> Option<PathBuf> {
    if path.is_dir() {
        return Some(path.to_path_buf());
    }
    let name = path.file_name()?;
    let folder = path.parent()?;
    let ours = name == CONFIG || (name == WEIGHTS && folder.join(CONFIG).is_file());
    ours.then(|| folder.to_path_buf())
}

pub(super) fn is_complete(folder: &Path) -> bool {
    is_configured(folder) && folder.join(WEIGHTS).is_file()
}

pub(super) fn is_configured(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

pub(super) fn open(folder: &Path, options: &SaeOptions) -> Result<Opened> {
    // The configuration's faults come first: they are the cheaper ones to mend.
    let config = read_config(folder, options)?;
    Rules::read(&config, Source::Folder(folder), options)?;
    let container = Container::open(&member(folder, WEIGHTS)?)?.unwrapped()?;
    open_container(folder, &container, options)
}

/// The same with weights under another name than SAELens', such as shards.
pub(super) fn open_container(
    folder: &Path,
    container: &Container,
    options: &SaeOptions,
) -> Result<Opened> {
    let config = read_config(folder, options)?;
    let rules = Rules::read(&config, Source::Folder(folder), options)?;
    let checkpoint = rules.find_arrays(container, &config, Layout::InputMajor)?;
    let recipe = rules.recipe("saelens", &config, &checkpoint)?;
    Ok(Opened { recipe, checkpoint, config: config.into_file(), converted: None })
}

fn read_config(folder: &Path, options: &SaeOptions) -> Result<Config> {
    let path = member(folder, CONFIG)?;
    Config::read(&path, options.recipe.as_ref())
}

/// A file that the folder must hold.
fn member(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let mut held: Vec<String> = std::fs::read_dir(folder)
        .map_err(|e| Error::io(folder, "list the folder", &e))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    held.sort();
    let list = if held.is_empty() { "nothing".to_string() } else { held.join(", ") };
    bail!(
        Io,
        "{}: {name} is missing; the folder holds {list}. Give a SAELens folder ({CONFIG} and \
         {WEIGHTS}) or a safetensors file with its recipe",
        folder.display()
    )
}

/// Where the keys stand.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// SAELens' own folder, whose library fills in what old versions did not write.
    Folder(&'a Path),
    Bare,
}

impl<'a> Source<'a> {
    fn folder(self) -> Option<&'a Path> {
        match self {
            Source::Folder(folder) => Some(folder),
            Source::Bare => None,
        }
    }
}

/// What a name under `architecture` stands for.
#[derive(Clone, Copy)]
struct Kind {
    architecture: Architecture,
    /// The library's own choice; converted files state theirs.
    selection: Selection,
    /// The decoder and b_dec are those of another place.
    transcoder: bool,
    /// A checkpoint whose one threshold is a running mean of the training.
    running_threshold: bool,
}

impl Kind {
    fn from_name(name: &str) -> Option<Kind> {
        let of = |architecture| Kind {
            architecture,
            selection: Selection::Largest,
            transcoder: false,
            running_threshold: false,
        };
        let transcoder = |architecture| Kind { transcoder: true, ..of(architecture) };
        Some(match name {
            "transcoder" | "skip_transcoder" => transcoder(Architecture::Standard),
            "jumprelu_transcoder" | "jumprelu_skip_transcoder" => {
                transcoder(Architecture::JumpRelu)
            }
            "abstopk" => Kind { selection: Selection::Magnitude, ..of(Architecture::TopK) },
            "batchtopk" | "matryoshka_batchtopk" => {
                Kind { running_threshold: true, ..of(Architecture::JumpRelu) }
            }
            _ => of(Architecture::from_name(name)?),
        })
    }
}

/// What the keys say, before any tensor is looked at.
pub(super) struct Rules {
    architecture: Architecture,
    k: Option<usize>,
    selection: Selection,
    transcoder: bool,
    running_threshold: bool,
    /// None: the key is absent, which SAELens takes as true.
    apply_b_dec: Option<bool>,
    bare: bool,
    normalization: &'static str,
    token_norm: TokenNorm,
    center_input: bool,
    scale: f64,
    output_scale: f64,
    decoder_norm: bool,
    /// Of converted files alone.
    threshold_on_norm: bool,
    /// Of converted files alone: a second encoder gates the first.
    glu: bool,
}

impl Rules {
    pub fn read(config: &Config, source: Source<'_>, options: &SaeOptions) -> Result<Rules> {
        let kind = kind(config, source)?;
        let architecture = kind.architecture;
        let topk = architecture == Architecture::TopK;
        let (normalization, token_norm) = normalization(config)?;
        let rescale = match config.flag("rescale_acts_by_decoder_norm")? {
            None if kind.running_threshold => {
                return config.missing(
                    "rescale_acts_by_decoder_norm",
                    "state whether the threshold is for pre-activations times the decoder's norms \
                     (true, as new checkpoints are, or false)",
                );
            }
            stated => stated.unwrap_or(false),
        };
        let scale = input_scale(config, source, options, normalization)?;
        let bare = matches!(source, Source::Bare);
        let glu = bare && config.flag("use_glu_encoder")?.unwrap_or(false);
        if glu && architecture == Architecture::Gated {
            bail!(
                Unsupported,
                "{}: the key use_glu_encoder is true for a gated SAE, and no library has such; \
                 correct the key architecture",
                config.origin()
            );
        }
        let apply_b_dec = match (config.flag("apply_b_dec_to_input")?, kind.transcoder) {
            (Some(true), true) => bail!(
                Format,
                "{}: the key apply_b_dec_to_input is true, but a transcoder's b_dec belongs to its \
                 output; set the key to false",
                config.origin()
            ),
            (_, true) => Some(false),
            (stated, false) => stated,
        };
        Ok(Rules {
            architecture,
            k: if topk { Some(k(config)?) } else { None },
            selection: selection(config)?.filter(|_| topk && bare).unwrap_or(kind.selection),
            transcoder: kind.transcoder,
            running_threshold: kind.running_threshold,
            apply_b_dec,
            bare,
            normalization,
            token_norm,
            center_input: center_input(config, source.folder(), token_norm)?,
            scale,
            output_scale: config.real("output_scale")?.filter(|_| bare).unwrap_or(scale),
            // SAELens knows the key for topk kinds alone; converted files use it for any.
            decoder_norm: rescale && (topk || bare || kind.running_threshold),
            threshold_on_norm: bare && config.flag("threshold_on_decoder_norm")?.unwrap_or(false),
            glu,
        })
    }

    /// The vector that tells how many latents the arrays hold.
    pub fn latent_vector(&self) -> &'static str {
        if self.architecture == Architecture::Gated { "b_mag" } else { "b_enc" }
    }

    /// Finds the arrays that these rules use and checks them against each other.
    pub fn find_arrays(
        &self,
        container: &Container,
        config: &Config,
        layout: Layout,
    ) -> Result<Checkpoint> {
        self.refuse_foreign_tensors(container, config)?;
        let w_enc = matrix(container.need("W_enc")?, layout)?;
        // A transcoder may write another width than it reads; then nothing here uses what it writes.
        let elsewhere = self.transcoder
            && container.shape("b_dec").is_some_and(|shape| shape != [w_enc.inputs()].as_slice());
        let b_dec = match (container.find("b_dec")?, self.apply_b_dec) {
            (None, Some(true)) => Some(container.need("b_dec")?),
            (None, None) => bail!(
                TensorMissing,
                "{}: tensor b_dec is missing, and SAELens subtracts it from the input unless the \
                 key apply_b_dec_to_input is false; state that key if it is. The file holds {}",
                container.file().path().display(),
                container.list()
            ),
            // These tensors are also those of dictionary_learning and of Gemma Scope.
            (Some(_), None) if self.bare && self.architecture == Architecture::JumpRelu => {
                return config.missing(
                    "apply_b_dec_to_input",
                    "state whether b_dec is subtracted from the input: true in SAELens' jumprelu \
                     unless it says otherwise, false in Gemma Scope and in dictionary_learning's \
                     JumpReluAutoEncoder",
                );
            }
            (found, _) => found.filter(|_| !elsewhere),
        };
        let w_dec = match container.find("W_dec")?.filter(|_| !elsewhere) {
            None if self.decoder_norm || self.threshold_on_norm => Some(container.need("W_dec")?),
            found => found,
        };
        let gate = match self.architecture {
            Architecture::Gated => Some(GateArrays {
                b_gate: container.need("b_gate")?,
                r_mag: container.need("r_mag")?,
            }),
            _ => None,
        };
        let glu = match self.glu {
            true => Some(GluArrays {
                w_enc: matrix(container.need("W_enc_glu")?, layout)?,
                b_enc: container.need("b_enc_glu")?,
            }),
            false => None,
        };
        let threshold = match self.architecture {
            Architecture::JumpRelu => Some(self.threshold(container, w_enc.latents())?),
            _ => None,
        };
        let b_enc = container.need(self.latent_vector())?;
        let w_dec = w_dec.map(|array| decoder(array, &w_enc)).transpose()?;
        let stored = container.find("latent_ids")?.map(|ids| stored(&ids, config)).transpose()?;
        let checkpoint = Checkpoint { w_enc, b_enc, threshold, gate, glu, b_dec, w_dec, stored };
        check_sizes(config, &checkpoint)?;
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// One threshold for each latent.
    fn threshold(&self, container: &Container, latents: usize) -> Result<Array> {
        if self.running_threshold {
            let threshold = container.need("topk_threshold")?;
            let value = calibrated(&threshold.label(), scalar(&threshold)?, 0.0)?;
            // As SAELens folds the scale: the norms are of decoder rows divided by it.
            let divisor = if self.decoder_norm { self.output_scale } else { 1.0 };
            return Ok(repeated("topk_threshold", value / divisor, latents));
        }
        // Training checkpoints from before SAELens 6.48 have its logarithm.
        match container.find("log_threshold")? {
            Some(log) => exp(&log),
            None => container.need("threshold"),
        }
    }

    pub fn recipe(
        &self,
        format: &'static str,
        config: &Config,
        checkpoint: &Checkpoint,
    ) -> Result<Recipe> {
        let d_sae = match &checkpoint.stored {
            Some(stored) => stored.d_sae,
            None => checkpoint.w_enc.latents(),
        };
        if let Some(k) = self.k {
            check_k(k, self.selection, d_sae, config.origin())?;
        }
        let (hook, mut place) = Stated::read(&config.file_alone())?.resolve(config)?;
        let heads = ["hook_head_index", "hook_point_head_index"];
        if heads.iter().any(|key| config.find(key).is_some()) {
            // One head alone, which no site means.
            place = Place::new(Site::Unknown, place.layer);
        }
        Ok(Recipe {
            format,
            architecture: self.architecture,
            d_in: checkpoint.w_enc.inputs(),
            d_sae,
            k: self.k,
            selection: self.selection,
            dtype: checkpoint.w_enc.array().dtype(),
            b_dec_subtracted: self.apply_b_dec.unwrap_or(true),
            normalization: self.normalization.to_string(),
            token_norm: self.token_norm,
            center_input: self.center_input,
            scale: self.scale,
            output_scale: self.output_scale,
            decoder_norm_folded: self.decoder_norm,
            threshold_on_decoder_norm: self.threshold_on_norm,
            glu: self.glu,
            hook,
            site: place.site,
            layer: place.layer,
            hidden_states_index: place.hidden_states_index,
            model: config.text("model_name")?.map(str::to_string),
        })
    }

    /// A tensor of another architecture means that the keys or the file are wrong.
    fn refuse_foreign_tensors(&self, container: &Container, config: &Config) -> Result<()> {
        let path = container.file().path().display();
        let belongs = [
            ("threshold", Architecture::JumpRelu),
            ("log_threshold", Architecture::JumpRelu),
            ("b_gate", Architecture::Gated),
            ("b_mag", Architecture::Gated),
            ("r_mag", Architecture::Gated),
        ];
        for (name, owner) in belongs {
            if container.has(name) && owner != self.architecture {
                bail!(
                    Format,
                    "{path}: tensor {name} belongs to the architecture {}, but {} says {}; correct \
                     the key architecture",
                    owner.name(),
                    config.origin(),
                    self.architecture.name()
                );
            }
        }
        if container.has("W_enc_glu") && !self.glu {
            bail!(
                Format,
                "{path}: tensor W_enc_glu gates the encoder, but {} does not say so; set the key \
                 use_glu_encoder",
                config.origin()
            );
        }
        if container.has("topk_threshold") && !self.running_threshold {
            bail!(
                Format,
                "{path}: tensor topk_threshold belongs to a training checkpoint of the architecture \
                 batchtopk or matryoshka_batchtopk, but {} says {}; correct the key architecture",
                config.origin(),
                self.architecture.name()
            );
        }
        let thresholds: Vec<&str> = ["threshold", "log_threshold", "topk_threshold"]
            .into_iter()
            .filter(|name| container.has(name))
            .collect();
        if thresholds.len() > 1 {
            bail!(
                Format,
                "{path}: the tensors {} are one too many: an SAE has one kind of threshold; remove \
                 the other",
                thresholds.join(" and ")
            );
        }
        let Some(factor) = container.find("scaling_factor")? else { return Ok(()) };
        factor.expect_float()?;
        // SAELens ignores the tensor where it is 1 within torch.allclose.
        if factor.vector()?.iter().any(|v| v.is_nan() || (v - 1.0).abs() > 1e-8 + 1e-5) {
            bail!(
                Unsupported,
                "{} is not all ones: a legacy finetuning factor, which is not applied; use an SAE \
                 without it",
                factor.label()
            );
        }
        Ok(())
    }
}

/// d_in and, unless the file is partial, d_sae must be those of the encoder.
fn check_sizes(config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let w_enc = &checkpoint.w_enc;
    let whole = checkpoint.stored.is_none().then_some(("d_sae", w_enc.latents()));
    for (key, found) in [("d_in", w_enc.inputs())].into_iter().chain(whole) {
        if let Some(said) = config.count(key)?.filter(|said| *said != found) {
            let text = format!(
                "has the shape {:?}, so {key} is {found}, but {} says {said}",
                w_enc.array().shape(),
                config.origin()
            );
            return Err(w_enc.array().fault(Status::Format, text));
        }
    }
    Ok(())
}

/// The ids that a partial file (`blockem convert --latents`) holds.
fn stored(ids: &Array, config: &Config) -> Result<StoredLatents> {
    match config.count("d_sae")? {
        Some(d_sae) => StoredLatents::new(ids, d_sae),
        None => config.missing("d_sae", "a file with latent_ids must state the dictionary's size"),
    }
}

/// The architecture, with the rules of configurations before SAELens 6.
fn kind(config: &Config, source: Source<'_>) -> Result<Kind> {
    let old = is_before_6(config)?;
    let mut old_name = None;
    if old && !config.is_given("architecture") {
        let activation = match config.text("activation_fn_str")? {
            Some(name) => Some(name),
            None => config.text("activation_fn")?,
        };
        match activation {
            // These files say `standard` beside it.
            Some("topk") => old_name = Some("topk"),
            None | Some("relu") => {}
            Some(other) => bail!(
                Unsupported,
                "{}: the activation function {other} is not supported; known are relu and topk",
                config.origin()
            ),
        }
    }
    let name = match (old_name.or(config.text("architecture")?), source) {
        (Some(name), _) => name,
        (None, Source::Folder(_)) if old => "standard",
        _ => {
            return config.missing(
                "architecture",
                "state it (standard, jumprelu, gated or topk) in the file's __metadata__ or \
                 configuration, or in the options' recipe",
            );
        }
    };
    match (Kind::from_name(name), name) {
        (Some(kind), _) => Ok(kind),
        (None, "matching_pursuit" | "temporal") => bail!(
            Unsupported,
            "{}: the architecture {name} is not supported: {}; use an SAE of another architecture",
            config.origin(),
            match name {
                "temporal" => "its latents depend on the tokens before through an attention",
                _ =>
                    "its latents are chosen one after the other, each from what the last ones left",
            }
        ),
        (None, _) => bail!(
            Unsupported,
            "{}: the architecture {name} is not supported; known are standard, jumprelu, gated, topk, \
             abstopk, batchtopk, matryoshka_batchtopk, transcoder, skip_transcoder, \
             jumprelu_transcoder and jumprelu_skip_transcoder. A training checkpoint of another may \
             be saved with SAELens' save_inference_model",
            config.origin()
        ),
    }
}

/// Absent means old.
fn is_before_6(config: &Config) -> Result<bool> {
    let Some(version) = config.text("sae_lens_version")? else { return Ok(true) };
    match version.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(major) => Ok(major < 6),
        None => bail!(
            Format,
            "{}: the key sae_lens_version is {version:?}; it must be a version number",
            config.origin()
        ),
    }
}

fn k(config: &Config) -> Result<usize> {
    let old = config.find("activation_fn_kwargs").and_then(|kwargs| kwargs.get("k"));
    match old.filter(|v| !v.is_null() && !config.is_given("k")) {
        Some(value) => config.to_count("activation_fn_kwargs.k", value),
        None => match config.count("k")? {
            Some(k) => Ok(k),
            None => config.missing("k", "a topk SAE needs it: state the number of active latents"),
        },
    }
}

/// The key `selection` of a converted file.
fn selection(config: &Config) -> Result<Option<Selection>> {
    let Some(name) = config.text("selection")? else { return Ok(None) };
    match Selection::from_name(name) {
        Some(selection) => Ok(Some(selection)),
        None => bail!(
            Format,
            "{}: the key selection is {name}; it must be largest, magnitude, groups or batch",
            config.origin()
        ),
    }
}

fn normalization(config: &Config) -> Result<(&'static str, TokenNorm)> {
    let value = config.find("normalize_activations");
    match value {
        None | Some(Value::Bool(false)) => return Ok(("none", TokenNorm::None)),
        Some(Value::Bool(true)) => return Ok((SCALED, TokenNorm::None)),
        _ => {}
    }
    let token_norm = match config.text("normalize_activations")? {
        None | Some("none") => return Ok(("none", TokenNorm::None)),
        Some(SCALED) => return Ok((SCALED, TokenNorm::None)),
        Some("layer_norm") => TokenNorm::Layer,
        Some("constant_norm_rescale") => TokenNorm::Constant,
        Some(other) => bail!(
            Unsupported,
            "{}: the key normalize_activations is {other}, which is not supported: {}",
            config.origin(),
            match other {
                "covariance_whitening" =>
                    "fold it with SAELens (fold_activation_whitening) and save the SAE again",
                _ => "known are none, expected_average_only_in, constant_norm_rescale, layer_norm",
            }
        ),
    };
    Ok((token_norm.name(), token_norm))
}

/// The factor that hidden states are multiplied by: 1, or what a scaled SAE was trained with.
fn input_scale(
    config: &Config,
    source: Source<'_>,
    options: &SaeOptions,
    normalization: &str,
) -> Result<f64> {
    let origin = config.origin();
    let stated = config.real("input_scale")?;
    if normalization != SCALED {
        if options.input_scale.is_some_and(|s| s != 1.0) {
            bail!(
                InvalidArgument,
                "{origin}: an input scale was given, but the file says normalize_activations \
                 {normalization}: its rows already carry the scale. Leave the scale out, or set \
                 normalize_activations to {SCALED} in the options' recipe"
            );
        }
        if stated.is_some_and(|s| s != 1.0) {
            bail!(
                Format,
                "{origin}: the key input_scale contradicts normalize_activations {normalization}; \
                 remove it, or say {SCALED}"
            );
        }
        return Ok(1.0);
    }
    let (scale, from) = match (options.input_scale, stated, source) {
        (Some(scale), _, _) => (Some(scale), "the given input scale".to_string()),
        (None, Some(scale), _) => (Some(scale), format!("{origin}: the key input_scale")),
        (None, None, Source::Folder(folder)) => {
            let path = folder.join(SCALER);
            (scaler_file(&path)?, format!("{}: the key scaling_factor", path.display()))
        }
        (None, None, Source::Bare) => (None, String::new()),
    };
    match scale {
        Some(scale) if scale.is_finite() && scale > 0.0 => Ok(scale),
        Some(scale) if options.input_scale.is_some() => {
            bail!(InvalidArgument, "{from} is {scale}; it must be above 0 and finite")
        }
        Some(scale) => bail!(Format, "{from} is {scale}; it must be above 0 and finite"),
        None => bail!(
            RecipeIncomplete,
            "{origin}: the key normalize_activations is {SCALED}, but the scale sqrt(d_in)/mean|h| \
             is not in the checkpoint; put {SCALER} with the key scaling_factor beside it, or give \
             the option input_scale (--input-scale)"
        ),
    }
}

/// The scale that SAELens' trainer leaves beside unfinished checkpoints; null before it is known.
fn scaler_file(path: &Path) -> Result<Option<f64>> {
    match path.is_file() {
        true => Config::read(path, None)?.real("scaling_factor"),
        false => Ok(None),
    }
}

/// The decoder lies as [d_sae, d_in] unless only the other way fits.
pub(super) fn decoder(array: Array, w_enc: &Matrix) -> Result<Matrix> {
    let turned = array.shape() == [w_enc.inputs(), w_enc.latents()].as_slice();
    let layout = match turned && w_enc.inputs() != w_enc.latents() {
        true => Layout::InputMajor,
        false => Layout::LatentMajor,
    };
    matrix(array, layout)
}
