//! Writing an SAE, or some of its latents, as one safetensors file that [`super::bare`] reads back
//! to the same bits and the same recipe. Arrays keep their element types and are not folded;
//! encoder rows become contiguous, so that later gathers are a few reads.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result, bail};
use crate::output::{TensorEntry, safetensors_header, write_whole};
use crate::tensor::DType;

use super::array::{Array, Layout, Matrix};
use super::{Architecture, Recipe, Sae, Selection, Site, TokenNorm};

/// Bytes of a matrix that are in memory at a time.
const BLOCK: usize = 64 << 20;

impl Sae {
    /// Writes the SAE, or only the given latents under their ids in the dictionary, to `out`, which
    /// appears whole or not at all. `progress` hears (bytes done, bytes in all).
    pub fn convert(
        &self,
        latents: Option<&[u64]>,
        out: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        self.refuse_own_file(out)?;
        let ids = self.ids_to_write(latents)?;
        let rows = match &ids {
            Some(ids) => self.checkpoint.rows_of(ids)?,
            None => (0..self.recipe.d_sae).collect(),
        };
        let parts = self.parts(ids.as_deref(), &rows);
        let entries: Vec<TensorEntry> = parts.iter().map(Part::entry).collect();
        let header = safetensors_header(self.metadata(), &entries)?;
        let total = entries.iter().map(TensorEntry::bytes).sum::<Result<u64>>()?;
        write_whole(out, |file| {
            let mut done = 0;
            let mut write = |bytes: &[u8]| {
                file.write_all(bytes).map_err(|e| Error::io(out, "write the output file", &e))
            };
            write(&header)?;
            progress(done, total);
            for part in &parts {
                part.write(&mut |bytes| {
                    write(bytes)?;
                    done += bytes.len() as u64;
                    progress(done, total);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }

    /// Replacing what is being read would leave no way back.
    fn refuse_own_file(&self, out: &Path) -> Result<()> {
        let Ok(target) = out.canonicalize() else { return Ok(()) };
        let is_target = |path: &Path| path.canonicalize().is_ok_and(|path| path == target);
        let own = self.checkpoint.files().iter().any(|file| is_target(file.path()));
        if own || self.path.as_deref().is_some_and(is_target) {
            bail!(
                InvalidArgument,
                "{}: the output is the SAE that is being converted; choose another name",
                out.display()
            );
        }
        Ok(())
    }

    /// The ids of a partial output; none for the whole dictionary.
    fn ids_to_write(&self, latents: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
        let Some(ids) = latents else {
            return Ok(self.checkpoint.stored.as_ref().map(|stored| stored.ids.clone()));
        };
        if ids.is_empty() {
            bail!(InvalidArgument, "no latents to write; name at least one");
        }
        let mut seen = HashSet::new();
        if let Some(twice) = ids.iter().find(|id| !seen.insert(**id)) {
            bail!(LatentDuplicate, "latent {twice} is named twice");
        }
        // Refuses ids out of range and damaged rows before anything is written.
        self.gather(ids)?;
        Ok(Some(ids.to_vec()))
    }

    /// Everything that the file will hold, widest elements first so that all stay aligned.
    fn parts<'a>(&'a self, ids: Option<&[u64]>, rows: &'a [usize]) -> Vec<Part<'a>> {
        let c = &self.checkpoint;
        let mut parts = vec![Part::Matrix("W_enc", &c.w_enc, rows)];
        let bias = match self.recipe.architecture {
            Architecture::Gated => "b_mag",
            _ => "b_enc",
        };
        parts.push(Part::Latents(bias, &c.b_enc, rows));
        parts.extend(c.threshold.as_ref().map(|a| Part::Latents("threshold", a, rows)));
        if let Some(gate) = &c.gate {
            parts.push(Part::Latents("b_gate", &gate.b_gate, rows));
            parts.push(Part::Latents("r_mag", &gate.r_mag, rows));
        }
        if let Some(glu) = &c.glu {
            parts.push(Part::Matrix("W_enc_glu", &glu.w_enc, rows));
            parts.push(Part::Latents("b_enc_glu", &glu.b_enc, rows));
        }
        parts.extend(c.b_dec.as_ref().map(|a| Part::Whole("b_dec", a)));
        parts.extend(c.w_dec.as_ref().map(|m| Part::Matrix("W_dec", m, rows)));
        parts.extend(ids.map(|ids| Part::Ids(ids.to_vec())));
        parts.sort_by_key(|part| std::cmp::Reverse(part.dtype().size()));
        parts
    }

    /// The recipe in the keys that the reader understands, and where the arrays came from.
    fn metadata(&self) -> Map<String, Value> {
        let mut metadata = Map::new();
        let mut set = |key: &str, text: String| metadata.insert(key.into(), Value::String(text));
        set("format", "pt".into());
        set("cfg", Value::Object(configuration(&self.recipe)).to_string());
        set("converted_by", concat!("blockem ", env!("CARGO_PKG_VERSION")).into());
        set("source_format", self.recipe.format.into());
        let files = self.checkpoint.files();
        if !files.is_empty() {
            let names: Vec<String> = files.iter().map(|f| f.path().display().to_string()).collect();
            set("source", names.join(", "));
            set("source_bytes", files.iter().map(|file| file.len()).sum::<u64>().to_string());
        }
        if let Some(cfg) = &self.source_config {
            set("source_cfg", Value::Object(cfg.clone()).to_string());
        }
        metadata
    }
}

/// SAELens' keys, and `layout` and `input_scale` of the bare format.
fn configuration(recipe: &Recipe) -> Map<String, Value> {
    let mut cfg = Map::new();
    let mut set = |key: &str, value: Value| cfg.insert(key.to_string(), value);
    set("architecture", json!(recipe.architecture.name()));
    set("d_in", json!(recipe.d_in));
    set("d_sae", json!(recipe.d_sae));
    set("dtype", json!(recipe.dtype.name()));
    set("layout", json!(Layout::LatentMajor.name()));
    set("apply_b_dec_to_input", json!(recipe.b_dec_subtracted));
    // Whatever the owner calls a factor, these are the names that the bare format has for it.
    let normalization = match recipe.token_norm {
        TokenNorm::None if recipe.scale != 1.0 => "expected_average_only_in",
        norm => norm.name(),
    };
    set("normalize_activations", json!(normalization));
    set("input_scale", json!(recipe.scale));
    if recipe.center_input {
        set("center_input", json!(true));
    }
    if recipe.architecture == Architecture::TopK {
        set("k", json!(recipe.k));
        if recipe.selection != Selection::Largest {
            set("selection", json!(recipe.selection.name()));
        }
    }
    if recipe.architecture == Architecture::TopK || recipe.decoder_norm_folded {
        set("rescale_acts_by_decoder_norm", json!(recipe.decoder_norm_folded));
    }
    if recipe.output_scale != recipe.scale {
        set("output_scale", json!(recipe.output_scale));
    }
    if recipe.threshold_on_decoder_norm {
        set("threshold_on_decoder_norm", json!(true));
    }
    if recipe.glu {
        set("use_glu_encoder", json!(true));
    }
    if recipe.site != Site::Unknown {
        set("site", json!(recipe.site.name()));
    }
    if let Some(layer) = recipe.layer {
        set("layer", json!(layer));
    }
    if let Some(hook) = &recipe.hook {
        set("hook_name", json!(hook));
    }
    if let Some(model) = &recipe.model {
        set("model_name", json!(model));
    }
    cfg
}

/// One tensor of the output.
enum Part<'a> {
    /// Chosen rows of a matrix, written latent-major.
    Matrix(&'static str, &'a Matrix, &'a [usize]),
    /// Chosen elements of a vector over latents.
    Latents(&'static str, &'a Array, &'a [usize]),
    /// A vector over inputs.
    Whole(&'static str, &'a Array),
    Ids(Vec<u64>),
}

impl Part<'_> {
    fn name(&self) -> &'static str {
        match self {
            Part::Matrix(name, ..) | Part::Latents(name, ..) | Part::Whole(name, _) => name,
            Part::Ids(_) => "latent_ids",
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Part::Matrix(_, matrix, _) => matrix.array().dtype(),
            Part::Latents(_, array, _) | Part::Whole(_, array) => array.dtype(),
            Part::Ids(_) => DType::I64,
        }
    }

    fn shape(&self) -> Vec<usize> {
        match self {
            Part::Matrix(_, matrix, rows) => vec![rows.len(), matrix.inputs()],
            Part::Latents(_, _, rows) => vec![rows.len()],
            Part::Whole(_, array) => array.shape().to_vec(),
            Part::Ids(ids) => vec![ids.len()],
        }
    }

    fn entry(&self) -> TensorEntry {
        TensorEntry { name: self.name(), dtype: self.dtype(), shape: self.shape() }
    }

    /// Hands the bytes on in pieces of bounded size.
    fn write(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            Part::Matrix(_, matrix, rows) => {
                let row = matrix.inputs() * matrix.array().dtype().size();
                rows.chunks((BLOCK / row).max(1)).try_for_each(|some| sink(&matrix.gather(some)?))
            }
            Part::Latents(_, array, rows) => sink(&array.gather(rows)?),
            Part::Whole(_, array) => sink(&array.bytes()?),
            Part::Ids(ids) => {
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                sink(&bytes)
            }
        }
    }
}
