//! Does an SAE fit the hidden states that it is given? What `blockem verify` runs.
//!
//! For tokens t with hidden states x, latents z and the reconstruction x^ = z · W_dec + b_dec:
//!
//! ```text
//! mean L0              how many z of a token are not 0
//! explained variance   1 − Σ_t ‖x − x^‖² / Σ_t ‖x − mean x‖²
//! ```
//!
//! An SAE that is read rightly explains most of the variance with few latents. A wrong reading does
//! not, and often another one does: so some of the tokens are encoded again as if the file meant
//! something else, and whatever explains more is told.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::dictionary::{Chunk, Dictionary, Hidden};
use crate::error::{Result, Status, bail};
use crate::sae::{Architecture, Array, Container, Recipe, Sae, Selection, TokenNorm};
use crate::tensor::DType;

/// Tokens on which other readings are tried.
const TRIAL_TOKENS: usize = 256;
/// A latent that fires on more than this share of the tokens is dense.
const DENSE: f64 = 0.1;
/// An SAE that has this share of its latents on is not sparse.
const NOT_SPARSE: f64 = 0.1;
/// By how much L0 may miss the expected one, either way.
const L0_FACTOR: f64 = 3.0;
/// Another reading, or another layer, fits better if it explains so much more.
const BETTER_READING: f64 = 0.05;
const BETTER_LAYER: f64 = 0.02;
/// Below this, nothing fits.
const POOR: f64 = 0.3;

/// What the caller expects.
#[derive(Clone, Copy, Debug, Default)]
pub struct VerifyOptions {
    /// Active latents per token, as the SAE's page states them.
    pub expected_l0: Option<f64>,
}

/// Reads hidden states from the safetensors file `input` and returns a report.
///
/// `hidden` is [T, d] or [B, S, d], f32, f16 or bf16. Instead, or beside it, `hidden_states.N` are
/// the same tokens at Hugging Face's index N; the one that the SAE names is verified, the others are
/// compared with it. They are read for SAEs of block boundaries alone: what another site reads is in
/// none of them. Optional: `mask` [T] or [B, S], tokens to leave out are 0; `positions`, 0 for
/// the first token of a sequence (without it S, or T, is one sequence); `output` [.., d], what the
/// SAE reconstructs if that is not hidden (transcoders). `progress` hears (latents done, of latents).
pub fn verify(
    sae: &Sae,
    input: &Path,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Value> {
    let file = Container::open(input)?;
    let sample = Sample::read(&file, sae.recipe())?;
    let measured = measure(sae, sae.recipe(), &sample, progress)?;
    let all = measured.summary(&sample, |_| true);
    let rest = measured.summary(&sample, |t| !sample.first[t]);
    let (trials, layers) = tried(sae, &file, &sample, options)?;
    let judge =
        Judge { recipe: sae.recipe(), options, rest: &rest, trials: &trials, layers: &layers };
    let flags = judge.flags();
    Ok(json!({
        "format": sae.recipe().format,
        "site": sae.recipe().site.name(),
        "layer": sae.recipe().layer,
        "architecture": sae.recipe().architecture.name(),
        "tokens": sample.tokens,
        "first_tokens": sample.first.iter().filter(|first| **first).count(),
        "expected_l0": options.expected_l0.or(sae.recipe().k.map(|k| k as f64)),
        "with_first_token": all.json(),
        "without_first_token": rest.json(),
        "dead_latents": measured.dead(),
        "dense_latents": measured.dense(sample.tokens),
        "decoder_norms": sae.decoder_norms()?,
        "mean_norm": sample.mean_norm(),
        "readings": Value::Array(trials.iter().chain(&layers).map(Trial::json).collect()),
        "flags": flags,
    }))
}

/// The tokens that are verified.
struct Sample {
    tokens: usize,
    d: usize,
    /// [T, d]
    hidden: Vec<f32>,
    /// [T, d]: what is reconstructed, where it is not hidden.
    output: Option<Vec<f32>>,
    /// [T]
    first: Vec<bool>,
    /// Rows of the file's tensors that were taken.
    taken: Vec<usize>,
}

impl Sample {
    fn read(file: &Container, recipe: &Recipe) -> Result<Sample> {
        let d = recipe.d_in;
        let own = recipe.hidden_states_index.map(layer_name);
        let named = own.as_deref().map(|name| file.find(name)).transpose()?.flatten();
        let hidden = match (file.find("hidden")?, named, own) {
            (Some(hidden), None, _) | (None, Some(hidden), _) => hidden,
            (Some(_), Some(_), Some(own)) => bail!(
                Format,
                "{}: holds both hidden and {own}, which the SAE reads; keep one",
                file.file().path().display()
            ),
            (_, _, own) => bail!(
                TensorMissing,
                "{}: needs the tensor hidden [T, {d}] or [B, S, {d}]{}",
                file.file().path().display(),
                match own {
                    Some(own) => format!(", or {own}"),
                    None => format!(": the SAE's site is {}", told_place(recipe)),
                }
            ),
        };
        let (lead, values) = read_rows(&hidden, d)?;
        let rows: usize = lead.iter().product();
        let mask = numbers(file, "mask", &lead)?;
        let positions = numbers(file, "positions", &lead)?;
        let sequence = lead.last().copied().unwrap_or(1);
        let is_first = |t: usize| match &positions {
            Some(positions) => positions[t] == 0.0,
            None => t.is_multiple_of(sequence),
        };
        let counts = |t: &usize| mask.as_ref().is_none_or(|mask| mask[*t] != 0.0);
        let taken: Vec<usize> = (0..rows).filter(counts).collect();
        if taken.is_empty() {
            bail!(Format, "{}: there is no token to verify with", file.file().path().display());
        }
        let pick = |values: &[f32]| -> Vec<f32> {
            taken.iter().flat_map(|t| &values[t * d..][..d]).copied().collect()
        };
        let output = match file.find("output")? {
            Some(output) => {
                let (shape, values) = read_rows(&output, d)?;
                if shape != lead {
                    return Err(output.fault(Status::Shape, "must have hidden's shape".to_string()));
                }
                Some(pick(&values))
            }
            None => None,
        };
        Ok(Sample {
            tokens: taken.len(),
            d,
            hidden: pick(&values),
            output,
            first: taken.iter().map(|t| is_first(*t)).collect(),
            taken,
        })
    }

    /// Evenly chosen tokens that are no sequence's first, if there are others.
    fn trial(&self) -> Sample {
        let others: Vec<usize> = (0..self.tokens).filter(|t| !self.first[*t]).collect();
        let from = if others.is_empty() { (0..self.tokens).collect() } else { others };
        let step = from.len().div_ceil(TRIAL_TOKENS);
        let chosen: Vec<usize> = from.into_iter().step_by(step).collect();
        let pick = |values: &Vec<f32>| -> Vec<f32> {
            chosen.iter().flat_map(|t| &values[t * self.d..][..self.d]).copied().collect()
        };
        Sample {
            tokens: chosen.len(),
            d: self.d,
            hidden: pick(&self.hidden),
            output: self.output.as_ref().map(pick),
            first: chosen.iter().map(|t| self.first[*t]).collect(),
            taken: chosen.iter().map(|t| self.taken[*t]).collect(),
        }
    }

    fn target(&self) -> &[f32] {
        self.output.as_ref().unwrap_or(&self.hidden)
    }

    /// Mean of ‖x‖ over tokens that are no sequence's first, if there are others.
    fn mean_norm(&self) -> f64 {
        let norm = |t: usize| {
            self.hidden[t * self.d..][..self.d]
                .iter()
                .map(|x| (*x as f64).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let others: Vec<usize> = (0..self.tokens).filter(|t| !self.first[*t]).collect();
        let from = if others.is_empty() { (0..self.tokens).collect() } else { others };
        let count = from.len() as f64;
        from.into_iter().map(norm).sum::<f64>() / count
    }
}

/// The site, and the block in which it lies.
fn told_place(recipe: &Recipe) -> String {
    match recipe.layer {
        Some(layer) => format!("{} of block {layer}", recipe.site.name()),
        None => recipe.site.name().to_string(),
    }
}

fn layer_name(index: i64) -> String {
    format!("hidden_states.{index}")
}

/// A tensor [.., d] as rows of f32, and its leading dimensions.
fn read_rows(array: &Array, d: usize) -> Result<(Vec<usize>, Vec<f32>)> {
    let lead = match array.shape() {
        [lead @ .., last] if *last == d && (1..=2).contains(&lead.len()) => lead.to_vec(),
        shape => {
            let text = format!("has the shape {shape:?}; expected [T, {d}] or [B, S, {d}]");
            return Err(array.fault(Status::Shape, text));
        }
    };
    array.expect_float()?;
    Ok((lead, array.vector()?.into_iter().map(|x| x as f32).collect()))
}

fn numbers(file: &Container, name: &str, lead: &[usize]) -> Result<Option<Vec<f64>>> {
    let Some(array) = file.find(name)? else { return Ok(None) };
    array.expect_shape(lead, "one value for each token")?;
    let values = match array.dtype() {
        DType::U8 | DType::Bool => array.bytes()?.iter().map(|b| *b as f64).collect(),
        DType::I64 => array.integers()?.into_iter().map(|i| i as f64).collect(),
        _ => array.vector()?,
    };
    Ok(Some(values))
}

/// What one reading of an SAE gives on a sample.
struct Measured {
    /// [T]
    l0: Vec<u32>,
    /// [F]: on how many tokens each latent fires.
    fires: Vec<u32>,
    /// [T]: ‖x − x^‖²; none without a decoder.
    errors: Option<Vec<f64>>,
}

fn measure(
    sae: &Sae,
    recipe: &Recipe,
    sample: &Sample,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Measured> {
    let (tokens, d) = (sample.tokens, sample.d);
    let mut l0 = vec![0; tokens];
    let mut fires = vec![0; recipe.d_sae];
    let mut sums = vec![0.0f32; tokens * d];
    let decoder_bias = sae.decoder_bias(recipe)?;
    let hidden = Hidden { values: &sample.hidden, tokens };
    Dictionary { sae, recipe }.encode(hidden, &mut |chunk| {
        count(&chunk, &mut l0, &mut fires);
        let ids: Vec<u64> = chunk.latents.clone().map(|id| id as u64).collect();
        if chunk.z.iter().any(|z| *z != 0.0)
            && let Some(rows) = sae.decoder_rows(recipe, &ids)?
        {
            decode(&chunk, &rows, d, &mut sums);
        }
        progress(chunk.latents.end as u64, recipe.d_sae as u64);
        Ok(())
    })?;
    let errors = decoder_bias.map(|bias| {
        let error = |t: usize| {
            let (scale, mut mean) = undo_norm(recipe.token_norm, &sample.hidden[t * d..][..d]);
            if recipe.center_input {
                mean =
                    sample.target()[t * d..][..d].iter().map(|x| *x as f64).sum::<f64>() / d as f64;
            }
            let of = |i: usize| {
                let decoded = (sums[t * d + i] as f64 + bias[i]) * scale + mean;
                (sample.target()[t * d + i] as f64 - decoded).powi(2)
            };
            (0..d).map(of).sum::<f64>()
        };
        (0..tokens).map(error).collect()
    });
    Ok(Measured { l0, fires, errors })
}

/// What a token's reconstruction is multiplied by, and what is added then.
fn undo_norm(norm: TokenNorm, hidden: &[f32]) -> (f64, f64) {
    let d = hidden.len() as f64;
    let square = |mean: f64| hidden.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>();
    match norm {
        TokenNorm::None => (1.0, 0.0),
        TokenNorm::Constant => ((square(0.0) / d).sqrt(), 0.0),
        TokenNorm::Layer => {
            let mean = hidden.iter().map(|x| *x as f64).sum::<f64>() / d;
            ((square(mean) / (d - 1.0)).sqrt(), mean)
        }
    }
}

fn count(chunk: &Chunk<'_>, l0: &mut [u32], fires: &mut [u32]) {
    let width = chunk.latents.len();
    let fires = &mut fires[chunk.latents.clone()];
    for (l0, row) in l0.iter_mut().zip(chunk.z.chunks_exact(width)) {
        for (z, fires) in row.iter().zip(fires.iter_mut()) {
            let on = (*z != 0.0) as u32;
            (*l0, *fires) = (*l0 + on, *fires + on);
        }
    }
}

/// sums[t] += Σ_k z[t, k] · rows[k], by all cores.
fn decode(chunk: &Chunk<'_>, rows: &[f32], d: usize, sums: &mut [f32]) {
    let width = chunk.latents.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (sums.len() / d).div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (sums, z) in sums.chunks_mut(share * d).zip(chunk.z.chunks(share * width)) {
            scope.spawn(move || {
                for (sum, z) in sums.chunks_exact_mut(d).zip(z.chunks_exact(width)) {
                    for (z, row) in z.iter().zip(rows.chunks_exact(d)).filter(|(z, _)| **z != 0.0) {
                        sum.iter_mut().zip(row).for_each(|(sum, w)| *sum += z * w);
                    }
                }
            });
        }
    });
}

/// Means over some tokens.
struct Summary {
    tokens: usize,
    mean_l0: f64,
    explained_variance: Option<f64>,
}

impl Measured {
    fn summary(&self, sample: &Sample, of: impl Fn(usize) -> bool) -> Summary {
        let chosen: Vec<usize> = (0..sample.tokens).filter(|t| of(*t)).collect();
        let (d, n) = (sample.d, chosen.len() as f64);
        let mut mean = vec![0.0; d];
        let mut square = 0.0;
        for t in &chosen {
            for (mean, x) in mean.iter_mut().zip(&sample.target()[t * d..][..d]) {
                *mean += *x as f64 / n;
                square += (*x as f64).powi(2);
            }
        }
        let variance = square - n * mean.iter().map(|m| m * m).sum::<f64>();
        let explained = |errors: &Vec<f64>| {
            let error: f64 = chosen.iter().map(|t| errors[*t]).sum();
            (variance > 0.0).then(|| 1.0 - error / variance)
        };
        Summary {
            tokens: chosen.len(),
            mean_l0: chosen.iter().map(|t| self.l0[*t] as f64).sum::<f64>() / n,
            explained_variance: self.errors.as_ref().and_then(explained),
        }
    }

    fn dead(&self) -> usize {
        self.fires.iter().filter(|fires| **fires == 0).count()
    }

    fn dense(&self, tokens: usize) -> usize {
        self.fires.iter().filter(|fires| **fires as f64 > DENSE * tokens as f64).count()
    }
}

impl Summary {
    fn json(&self) -> Value {
        let number = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
        json!({
            "tokens": self.tokens,
            "mean_l0": number(self.mean_l0),
            "explained_variance": self.explained_variance.map(number),
        })
    }
}

/// Another reading, or another layer, on the trial's tokens.
struct Trial {
    name: String,
    /// What to do if it fits better.
    remedy: String,
    summary: Summary,
    gain: Option<f64>,
}

impl Trial {
    fn json(&self) -> Value {
        let Value::Object(mut report) = self.summary.json() else { return Value::Null };
        report.insert("reading".into(), json!(self.name));
        Value::Object(report)
    }
}

/// The file as it is read, then as if it meant something else; and at other layers.
fn tried(
    sae: &Sae,
    file: &Container,
    sample: &Sample,
    options: &VerifyOptions,
) -> Result<(Vec<Trial>, Vec<Trial>)> {
    let own = sae.recipe();
    let trial = sample.trial();
    let as_read = measure(sae, own, &trial, &mut |_, _| {})?.summary(&trial, |_| true);
    let base = as_read.explained_variance;
    let gain = |summary: &Summary| Some(summary.explained_variance? - base?);
    let first =
        Trial { name: "as_read".into(), remedy: String::new(), summary: as_read, gain: None };
    let mut trials = vec![first];
    for (name, remedy, recipe) in other_readings(sae, &trial, options) {
        let summary = measure(sae, &recipe, &trial, &mut |_, _| {})?.summary(&trial, |_| true);
        trials.push(Trial { name: name.into(), remedy, gain: gain(&summary), summary });
    }
    let mut layers = Vec::new();
    let indices = if own.site.is_boundary() { 0..512 } else { 0..0 };
    for index in indices {
        let name = layer_name(index);
        let Some(array) = file.find(&name)?.filter(|_| own.hidden_states_index != Some(index))
        else {
            continue;
        };
        let (_, values) = read_rows(&array, sample.d)?;
        let rows = |t: &usize| values.get(t * sample.d..(t + 1) * sample.d);
        let hidden: Option<Vec<&[f32]>> = trial.taken.iter().map(rows).collect();
        let Some(hidden) = hidden else {
            return Err(array.fault(Status::Shape, "must have hidden's shape".to_string()));
        };
        let there = Sample {
            hidden: hidden.concat(),
            output: trial.output.clone(),
            first: trial.first.clone(),
            taken: trial.taken.clone(),
            ..trial
        };
        let summary = measure(sae, own, &there, &mut |_, _| {})?.summary(&there, |_| true);
        let remedy = match index {
            0 => "read hidden_states[0], the embedding".to_string(),
            _ => format!(
                "read hidden_states[{index}], the output of block {}, counted from 0",
                index - 1
            ),
        };
        layers.push(Trial { name, remedy, gain: gain(&summary), summary });
    }
    Ok((trials, layers))
}

/// The mistakes that loaders are known for, each undone.
fn other_readings(
    sae: &Sae,
    trial: &Sample,
    options: &VerifyOptions,
) -> Vec<(&'static str, String, Recipe)> {
    let own = sae.recipe();
    let mut readings = Vec::new();
    let mut add = |name, remedy: String, change: &dyn Fn(&mut Recipe)| {
        let mut recipe = own.clone();
        change(&mut recipe);
        readings.push((name, remedy, recipe));
    };
    if own.token_norm == TokenNorm::None {
        let scale = (own.d_in as f64).sqrt() / trial.mean_norm();
        let set = |scale: f64| {
            move |r: &mut Recipe| {
                (r.scale, r.output_scale) = (scale, scale * r.output_scale / r.scale)
            }
        };
        match own.scale == 1.0 && own.output_scale == 1.0 {
            true => {
                let remedy = format!(
                    "the SAE wants hidden states of mean norm sqrt(d): give --input-scale {scale:.6}"
                );
                add("missing_scale", remedy, &set(scale));
            }
            false => {
                let remedy = "the rows carry the scale already: set normalize_activations to none";
                add("scale_applied_twice", remedy.into(), &set(1.0));
            }
        }
    }
    if own.token_norm == TokenNorm::None {
        let remedy = format!("set center_input to {}", !own.center_input);
        let name = if own.center_input { "centred_wrongly" } else { "centring_forgotten" };
        add(name, remedy, &|r| r.center_input = !r.center_input);
    }
    if sae.has_decoder_bias() {
        let remedy = format!("set apply_b_dec_to_input to {}", !own.b_dec_subtracted);
        let name =
            if own.b_dec_subtracted { "b_dec_subtracted_wrongly" } else { "b_dec_forgotten" };
        add(name, remedy, &|r| r.b_dec_subtracted = !r.b_dec_subtracted);
    }
    if own.architecture == Architecture::JumpRelu && sae.has_decoder() {
        let remedy =
            "thresholds are meant for pre-activations times the decoder's norms, or are not";
        add("threshold_on_decoder_norm", remedy.into(), &|r| {
            r.threshold_on_decoder_norm = !r.threshold_on_decoder_norm;
        });
    }
    let expected = options.expected_l0.map(|l0| l0.round() as usize);
    if let (Architecture::Standard, Some(k @ 1..)) = (own.architecture, expected)
        && k <= own.d_sae
    {
        let remedy = format!("set architecture to topk and k to {k}");
        add("topk_read_as_relu", remedy, &|r| {
            (r.architecture, r.k, r.selection) = (Architecture::TopK, Some(k), Selection::Largest);
        });
    }
    readings
}

/// What the numbers look like.
struct Judge<'a> {
    recipe: &'a Recipe,
    options: &'a VerifyOptions,
    rest: &'a Summary,
    trials: &'a [Trial],
    layers: &'a [Trial],
}

impl Judge<'_> {
    fn flags(&self) -> Value {
        let mut flags = Vec::new();
        let mut flag = |name: &str, text: String| flags.push(json!({ "flag": name, "text": text }));
        self.judge_sparsity(&mut flag);
        let best = |trials: &'_ [Trial], margin: f64| -> Option<usize> {
            let better = |i: &usize| trials[*i].gain.is_some_and(|gain| gain > margin);
            let by_gain = |a: &usize, b: &usize| {
                trials[*a].gain.unwrap_or(0.0).total_cmp(&trials[*b].gain.unwrap_or(0.0))
            };
            (0..trials.len()).filter(better).max_by(by_gain)
        };
        if let Some(trial) = best(self.trials, BETTER_READING).map(|i| &self.trials[i]) {
            flag(&trial.name, self.told(trial));
        }
        if let Some(trial) = best(self.layers, BETTER_LAYER).map(|i| &self.layers[i]) {
            flag("wrong_layer", self.told(trial));
        }
        if let Some(explained) = self.rest.explained_variance.filter(|ev| *ev < POOR || ev.is_nan())
        {
            flag(
                "poor_reconstruction",
                format!(
                    "the SAE explains {explained:.3} of the variance: hidden states of another layer, \
                     site (it reads {}) or model, or a reading that was not tried",
                    told_place(self.recipe)
                ),
            );
        }
        Value::Array(flags)
    }

    fn told(&self, trial: &Trial) -> String {
        let of = |summary: &Summary| summary.explained_variance.unwrap_or(f64::NAN);
        format!(
            "explained variance {:.3} instead of {:.3} by reading it so: {}",
            of(&trial.summary),
            of(&self.trials[0].summary),
            trial.remedy
        )
    }

    fn judge_sparsity(&self, flag: &mut dyn FnMut(&str, String)) {
        let (l0, d_sae) = (self.rest.mean_l0, self.recipe.d_sae);
        let topk = self.recipe.k.map(|k| k as f64);
        if let Some(expected) = self.options.expected_l0.or(topk)
            && !(expected / L0_FACTOR..=expected * L0_FACTOR).contains(&l0)
        {
            let cause = match l0 > expected {
                true => {
                    "more: a TopK or thresholded SAE read as a plain ReLU, a missing scale, or \
                     hidden states of another layer look like this"
                }
                false => {
                    "fewer: a missing scale, or hidden states of another layer, look like this"
                }
            };
            flag("l0", format!("{l0:.1} latents per token, {expected:.1} expected, {cause}"));
        } else if l0 > NOT_SPARSE * d_sae as f64 {
            flag(
                "not_sparse",
                format!(
                    "{l0:.1} of {d_sae} latents per token: a TopK or thresholded SAE read as a plain \
                     ReLU, or a missing scale, looks like this"
                ),
            );
        }
    }
}

/// A report as lines for people.
pub fn report_lines(report: &Value) -> String {
    let number = |v: &Value| match v {
        Value::Null => "-".to_string(),
        Value::Number(n) if n.is_f64() => format!("{:.4}", n.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let object = |v: &Value| -> String {
        let empty = Map::new();
        let parts = v.as_object().unwrap_or(&empty).iter();
        parts.map(|(k, v)| format!("{k} {}", number(v))).collect::<Vec<_>>().join(", ")
    };
    let mut lines = String::new();
    for (key, value) in report.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("flags", Value::Array(flags)) => {
                if flags.is_empty() {
                    lines += &format!("{key:28}none\n");
                }
                for flag in flags {
                    lines +=
                        &format!("flag: {}: {}\n", number(&flag["flag"]), number(&flag["text"]));
                }
            }
            ("readings", Value::Array(readings)) => {
                for reading in readings {
                    let name = number(&reading["reading"]);
                    lines += &format!(
                        "{:28}mean_l0 {}, explained_variance {}\n",
                        format!("  {name}"),
                        number(&reading["mean_l0"]),
                        number(&reading["explained_variance"])
                    );
                }
            }
            (_, Value::Object(_)) => lines += &format!("{key:28}{}\n", object(value)),
            _ => lines += &format!("{key:28}{}\n", number(value)),
        }
    }
    lines
}
