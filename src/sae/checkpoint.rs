//! The arrays of one checkpoint and the one fold that turns them into the internal form.
//!
//! For latent k with encoder row W_k, bias b_k, decoder row D_k, input scale s:
//!
//! ```text
//! u_k = f_k · ((s·h − b_dec)·W_k + b_k)          f_k = ‖D_k‖/s_out if decoder norms are folded, else 1
//!     = (f_k·s·W_k)·h + f_k·(b_k − b_dec·W_k)    b_dec only where it is subtracted
//! ```
//!
//! A GLU encoder multiplies u_k by sigmoid((s·h − b_dec)·G_k + c_k), which folds the same way, f_k
//! aside. Under layer norm, and with `center_input`, h is centred; W_k less its mean gives the same
//! product with h as it is.
//!
//! Every fold is computed in f64 and rounded to f32 once.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Result, Status, bail};

use super::array::{Array, Matrix};
use super::file::DataFile;
use super::{Architecture, EncoderRows, GateRows, GluRows, Recipe, TokenNorm};

/// The arrays that a format found; the recipe says how they combine.
pub(super) struct Checkpoint {
    pub w_enc: Matrix,
    /// Of a gated SAE the magnitude bias.
    pub b_enc: Array,
    pub threshold: Option<Array>,
    pub gate: Option<GateArrays>,
    pub glu: Option<GluArrays>,
    pub b_dec: Option<Array>,
    pub w_dec: Option<Matrix>,
    /// The dictionary's latents that a partial file holds; without it, all of them in order.
    pub stored: Option<StoredLatents>,
}

/// Gated only: on where x·W + b_gate > 0; the magnitude is e^r_mag (x·W) + b_enc.
pub(super) struct GateArrays {
    pub b_gate: Array,
    pub r_mag: Array,
}

/// Of a GLU encoder only: u is multiplied by sigmoid(x·W + b).
pub(super) struct GluArrays {
    pub w_enc: Matrix,
    pub b_enc: Array,
}

/// Which latents of the dictionary a partial file holds, and in which row.
pub(super) struct StoredLatents {
    pub d_sae: usize,
    pub ids: Vec<u64>,
    row_of: HashMap<u64, usize>,
}

impl StoredLatents {
    pub fn new(source: &Array, d_sae: usize) -> Result<StoredLatents> {
        let mut ids = Vec::new();
        let mut row_of = HashMap::new();
        for (row, id) in source.integers()?.into_iter().enumerate() {
            let Some(valid) = u64::try_from(id).ok().filter(|id| *id < d_sae as u64) else {
                let text = format!("holds the id {id}, but the dictionary has {d_sae} latents");
                return Err(source.fault(Status::LatentRange, text));
            };
            if row_of.insert(valid, row).is_some() {
                let text = format!("holds the id {id} twice");
                return Err(source.fault(Status::LatentDuplicate, text));
            }
            ids.push(valid);
        }
        Ok(StoredLatents { d_sae, ids, row_of })
    }
}

impl Checkpoint {
    /// Checks every array's type and shape against the encoder's.
    pub fn check(&self) -> Result<()> {
        let (latents, inputs) = (self.w_enc.latents(), self.w_enc.inputs());
        let encoder = self.w_enc.array();
        encoder.expect_float()?;
        if latents == 0 || inputs == 0 {
            let text = format!("has the shape {:?}: there is nothing in it", encoder.shape());
            return Err(encoder.fault(Status::Shape, text));
        }
        if let Some(stored) = self.stored.as_ref().filter(|s| s.ids.len() != latents) {
            let text = format!("has rows for {latents} latents, latent_ids {}", stored.ids.len());
            return Err(encoder.fault(Status::Shape, text));
        }
        for array in self.latent_vectors() {
            array.expect_float()?;
            array.expect_shape(&[latents], "one value per latent of the encoder")?;
        }
        if let Some(b_dec) = &self.b_dec {
            b_dec.expect_float()?;
            b_dec.expect_shape(&[inputs], "one value per input of the encoder")?;
        }
        for matrix in self.w_dec.iter().chain(self.glu.as_ref().map(|glu| &glu.w_enc)) {
            matrix.array().expect_float()?;
            let shape = matrix.layout().shape(latents, inputs);
            matrix.array().expect_shape(&shape, "the encoder's latents and inputs")?;
        }
        Ok(())
    }

    /// The files that hold the arrays, the encoder's first; none if the caller gave them.
    pub fn files(&self) -> Vec<&Arc<DataFile>> {
        let matrices = self.w_dec.iter().chain(self.glu.as_ref().map(|glu| &glu.w_enc));
        let arrays = [self.w_enc.array()]
            .into_iter()
            .chain(self.latent_vectors())
            .chain(&self.b_dec)
            .chain(matrices.map(Matrix::array));
        let mut files: Vec<&Arc<DataFile>> = Vec::new();
        for file in arrays.filter_map(Array::file) {
            if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
                files.push(file);
            }
        }
        files
    }

    /// Folded rows of the given latents, in their order.
    pub fn gather(&self, recipe: &Recipe, ids: &[u64]) -> Result<EncoderRows> {
        let rows = self.rows_of(ids)?;
        let d = self.w_enc.inputs();
        let raw = self.w_enc.gather(&rows)?;
        let bias = self.b_enc.pick(&rows)?;
        let b_dec = self.subtracted(recipe)?;
        let factor = self.factors(recipe, ids, &rows)?;
        let gate = match &self.gate {
            Some(gate) => Some((gate.b_gate.pick(&rows)?, gate.r_mag.pick(&rows)?)),
            None => None,
        };

        let mut out = EncoderRows {
            d_in: d,
            weight: Vec::with_capacity(ids.len() * d),
            bias: Vec::with_capacity(ids.len()),
            threshold: self.picked_thresholds(recipe, ids, &rows)?,
            gate: gate.is_some().then(GateRows::default),
            glu: self.glu_rows(recipe, ids, &rows, &b_dec)?,
            rank_gain: self.rank_gains(recipe, ids, &rows)?,
        };
        let fold = Fold { checkpoint: self, recipe, b_dec: &b_dec };
        let mut row = Vec::with_capacity(d);
        for (k, bytes) in raw.chunks_exact(d * self.w_enc.array().dtype().size()).enumerate() {
            self.w_enc.decode_row(ids[k], bytes, &mut row)?;
            let f = factor[k];
            let shift = fold.row(ids[k], &row, f, &mut out.weight)?;
            let Some((b_gate, r_mag)) = &gate else {
                out.bias.push(self.rounded(ids[k], f * (bias[k] - shift))?);
                continue;
            };
            let magnitude = r_mag[k].exp();
            out.bias.push(self.rounded(ids[k], bias[k] - magnitude * shift)?);
            if let Some(rows) = &mut out.gate {
                rows.bias.push(self.rounded(ids[k], b_gate[k] - shift)?);
                rows.scale.push(self.rounded(ids[k], magnitude)?);
            }
        }
        Ok(out)
    }

    /// Of a GLU encoder: the second one's rows.
    fn glu_rows(
        &self,
        recipe: &Recipe,
        ids: &[u64],
        rows: &[usize],
        b_dec: &[f64],
    ) -> Result<Option<GluRows>> {
        let Some(glu) = &self.glu else { return Ok(None) };
        let d = glu.w_enc.inputs();
        let raw = glu.w_enc.gather(rows)?;
        let bias = glu.b_enc.pick(rows)?;
        let fold = Fold { checkpoint: self, recipe, b_dec };
        let mut row = Vec::with_capacity(d);
        let mut out = GluRows::default();
        for (k, bytes) in raw.chunks_exact(d * glu.w_enc.array().dtype().size()).enumerate() {
            glu.w_enc.decode_row(ids[k], bytes, &mut row)?;
            let shift = fold.row(ids[k], &row, 1.0, &mut out.weight)?;
            out.bias.push(self.rounded(ids[k], bias[k] - shift)?);
        }
        Ok(Some(out))
    }

    /// D_k / (s_out · f_k): what z of latent k is decoded with.
    pub fn decoder_rows(&self, recipe: &Recipe, ids: &[u64]) -> Result<Option<Vec<f32>>> {
        let Some(w_dec) = &self.w_dec else { return Ok(None) };
        let rows = self.rows_of(ids)?;
        let factors = self.factors(recipe, ids, &rows)?;
        let raw = w_dec.gather(&rows)?;
        let mut row = Vec::with_capacity(w_dec.inputs());
        let mut out = Vec::with_capacity(ids.len() * w_dec.inputs());
        let size = w_dec.inputs() * w_dec.array().dtype().size();
        for ((id, factor), bytes) in ids.iter().zip(factors).zip(raw.chunks_exact(size)) {
            w_dec.decode_row(*id, bytes, &mut row)?;
            // A latent without a decoder row decodes to nothing.
            let divisor = if factor == 0.0 { 1.0 } else { recipe.output_scale * factor };
            out.extend(row.iter().map(|w| (w / divisor) as f32));
        }
        Ok(Some(out))
    }

    /// D_k / ‖D_k‖: where latent k points. No fold turns a row, so it is the hidden states' own space.
    pub fn decoder_directions(&self, ids: &[u64]) -> Result<Option<Vec<f32>>> {
        let Some(w_dec) = &self.w_dec else { return Ok(None) };
        let raw = w_dec.gather(&self.rows_of(ids)?)?;
        let mut row = Vec::with_capacity(w_dec.inputs());
        let mut out = Vec::with_capacity(ids.len() * w_dec.inputs());
        let size = w_dec.inputs() * w_dec.array().dtype().size();
        for (id, bytes) in ids.iter().zip(raw.chunks_exact(size)) {
            w_dec.decode_row(*id, bytes, &mut row)?;
            // Squares of what is at most 1 neither overflow nor vanish.
            let largest = row.iter().fold(0.0, |largest: f64, w| largest.max(w.abs()));
            if largest == 0.0 {
                bail!(
                    InvalidArgument,
                    "{}: the decoder row of latent {id} is zero, so it has no direction; leave the \
                     latent out",
                    w_dec.array().label()
                );
            }
            row.iter_mut().for_each(|w| *w /= largest);
            let norm = row.iter().map(|w| w * w).sum::<f64>().sqrt();
            out.extend(row.iter().map(|w| (w / norm) as f32));
        }
        Ok(Some(out))
    }

    /// b_dec / s_out, or zeros; none without a decoder.
    pub fn decoder_bias(&self, recipe: &Recipe) -> Result<Option<Vec<f64>>> {
        if self.w_dec.is_none() {
            return Ok(None);
        }
        let Some(b_dec) = &self.b_dec else { return Ok(Some(vec![0.0; recipe.d_in])) };
        let bias = b_dec.pick(&(0..recipe.d_in).collect::<Vec<_>>())?;
        Ok(Some(bias.into_iter().map(|b| b / recipe.output_scale).collect()))
    }

    /// Of all stored latents; none without a decoder.
    pub fn all_decoder_norms(&self) -> Result<Option<Vec<f32>>> {
        const AT_ONCE: usize = 2048;
        if self.w_dec.is_none() {
            return Ok(None);
        }
        let latents: Vec<usize> = (0..self.w_enc.latents()).collect();
        let mut norms = Vec::with_capacity(latents.len());
        for rows in latents.chunks(AT_ONCE) {
            let ids: Vec<u64> = rows.iter().map(|row| *row as u64).collect();
            norms.extend(self.decoder_norms(&ids, rows)?.into_iter().map(|norm| norm as f32));
        }
        Ok(Some(norms))
    }

    /// All stored thresholds as the file states them.
    pub fn thresholds(&self) -> Result<Option<Vec<f32>>> {
        let Some(array) = &self.threshold else { return Ok(None) };
        let mut all = Vec::with_capacity(array.shape().iter().product());
        array.visit(|i, v| {
            all.push(array.finite(v, || format!("[{i}]"))? as f32);
            Ok(())
        })?;
        Ok(Some(all))
    }

    /// Where the given latents lie in the arrays.
    pub fn rows_of(&self, ids: &[u64]) -> Result<Vec<usize>> {
        let Some(stored) = &self.stored else {
            return Ok(ids.iter().map(|id| *id as usize).collect());
        };
        let find = |id: &u64| match stored.row_of.get(id) {
            Some(row) => Ok(*row),
            None => bail!(
                LatentRange,
                "{}: latent {id} is not in this partial file, which holds {}; convert the whole \
                 dictionary, or with this latent among --latents",
                self.w_enc.array().label(),
                list_ids(&stored.ids)
            ),
        };
        ids.iter().map(find).collect()
    }

    /// b_dec if the recipe subtracts it, else nothing.
    fn subtracted(&self, recipe: &Recipe) -> Result<Vec<f64>> {
        match &self.b_dec {
            Some(b_dec) if recipe.b_dec_subtracted => {
                b_dec.pick(&(0..recipe.d_in).collect::<Vec<_>>())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// f_k. As in SAELens the decoder is divided by the scale before its norms are taken.
    fn factors(&self, recipe: &Recipe, ids: &[u64], rows: &[usize]) -> Result<Vec<f64>> {
        if !recipe.decoder_norm_folded {
            return Ok(vec![1.0; ids.len()]);
        }
        let norms = self.decoder_norms(ids, rows)?;
        Ok(norms.into_iter().map(|norm| norm / recipe.output_scale).collect())
    }

    /// Of the given latents; 1 where the checkpoint has no decoder.
    fn decoder_norms(&self, ids: &[u64], rows: &[usize]) -> Result<Vec<f64>> {
        let Some(w_dec) = &self.w_dec else { return Ok(vec![1.0; ids.len()]) };
        let raw = w_dec.gather(rows)?;
        let mut row = Vec::with_capacity(w_dec.inputs());
        let mut norms = Vec::with_capacity(ids.len());
        let size = w_dec.inputs() * w_dec.array().dtype().size();
        for (id, bytes) in ids.iter().zip(raw.chunks_exact(size)) {
            w_dec.decode_row(*id, bytes, &mut row)?;
            norms.push(row.iter().map(|v| v * v).sum::<f64>().sqrt());
        }
        Ok(norms)
    }

    /// z = relu(u) where u > threshold: a threshold below 0 is the same as 0.
    fn picked_thresholds(
        &self,
        recipe: &Recipe,
        ids: &[u64],
        rows: &[usize],
    ) -> Result<Option<Vec<f32>>> {
        let Some(array) = &self.threshold else { return Ok(None) };
        let mut picked = array.pick(rows)?;
        if recipe.threshold_on_decoder_norm {
            // n u > th; with n = 0 that is never so.
            for (th, norm) in picked.iter_mut().zip(self.decoder_norms(ids, rows)?) {
                *th = (*th / norm).min(f32::MAX as f64);
            }
        }
        Ok(Some(picked.into_iter().map(|v| v.max(0.0) as f32).collect()))
    }

    fn rank_gains(&self, recipe: &Recipe, ids: &[u64], rows: &[usize]) -> Result<Option<Vec<f32>>> {
        if recipe.architecture != Architecture::TopK || !recipe.threshold_on_decoder_norm {
            return Ok(None);
        }
        let norms = self.decoder_norms(ids, rows)?.into_iter().zip(ids);
        norms.map(|(norm, id)| self.rounded(*id, norm)).collect::<Result<_>>().map(Some)
    }

    fn rounded(&self, latent: u64, value: f64) -> Result<f32> {
        let narrow = value as f32;
        if narrow.is_finite() {
            return Ok(narrow);
        }
        bail!(
            NonFinite,
            "{}: latent {latent} folds to {value}, which float32 cannot hold; check the scale and \
             the weights",
            self.w_enc.array().label()
        )
    }

    /// The arrays that hold one value per stored latent.
    pub fn latent_vectors(&self) -> Vec<&Array> {
        let gate = self.gate.iter().flat_map(|g| [&g.b_gate, &g.r_mag]);
        let glu = self.glu.iter().map(|glu| &glu.b_enc);
        [&self.b_enc].into_iter().chain(&self.threshold).chain(gate).chain(glu).collect()
    }
}

/// What is folded into every encoder row.
struct Fold<'a> {
    checkpoint: &'a Checkpoint,
    recipe: &'a Recipe,
    /// Empty where it is not subtracted.
    b_dec: &'a [f64],
}

impl Fold<'_> {
    /// Appends a latent's folded row times `factor`; returns b_dec · row, which its bias loses.
    fn row(&self, latent: u64, row: &[f64], factor: f64, out: &mut Vec<f32>) -> Result<f64> {
        let centered = self.recipe.center_input || self.recipe.token_norm == TokenNorm::Layer;
        let mean = if centered { row.iter().sum::<f64>() / row.len() as f64 } else { 0.0 };
        for w in row {
            let folded = factor * self.recipe.scale * (w - mean);
            out.push(self.checkpoint.rounded(latent, folded)?);
        }
        Ok(self.b_dec.iter().zip(row).map(|(b, w)| b * w).sum())
    }
}

fn list_ids(ids: &[u64]) -> String {
    const SHOWN: usize = 8;
    let text: Vec<String> = ids.iter().take(SHOWN).map(u64::to_string).collect();
    match ids.len() {
        0 => "no latents".to_string(),
        n if n <= SHOWN => text.join(", "),
        n => format!("{} and {} more", text.join(", "), n - SHOWN),
    }
}
