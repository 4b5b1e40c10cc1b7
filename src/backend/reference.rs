//! The oracle: the formulas in f64, one token at a time, in the order in which they are written.
//! Slow and obvious; every other backend is compared with it.

use half::{bf16, f16};

use super::{
    Backend, BackwardCall, Directions, EncodeCall, Gate, Grad, Matrix, OwnedGate, OwnedRows,
    PenaltyCall, ReadRivals, ReadRows, Rows, StatsBackend, StatsCall, SteerBackend, SteerCall,
    TokenNormsCall, TopK,
};
use crate::error::Result;
use crate::sae::{EncoderRows, TokenNorm};
use crate::stats::rows;
use crate::tensor::{DType, Stream};

pub(crate) struct Reference {
    rows: OwnedRows,
    /// Of a TopK gate: all rivals.
    rivals: EncoderRows,
}

impl Reference {
    pub fn new(rows: OwnedRows, rivals: ReadRivals<'_>) -> Result<Reference> {
        let rivals = match &rows.gate {
            OwnedGate::TopK(gate) => rivals(0..gate.rivals())?,
            _ => EncoderRows::default(),
        };
        Ok(Reference { rows, rivals })
    }

    fn formulas(&self) -> Formulas<'_> {
        Formulas { rows: self.rows.borrow(), rivals: &self.rivals }
    }
}

impl Backend for Reference {
    fn numerics(&self) -> String {
        "reference-1".into()
    }

    fn num_threads(&self) -> usize {
        1
    }

    fn takes_f64(&self) -> bool {
        true
    }

    fn workspace_size(&self, _tokens: usize) -> usize {
        0
    }

    unsafe fn encode(&self, call: &EncodeCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.formulas().encode(call) };
        Ok(())
    }

    unsafe fn penalty(&self, call: &PenaltyCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.formulas().penalty(call) };
        Ok(())
    }

    unsafe fn backward(&self, call: &BackwardCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.formulas().backward(call) };
        Ok(())
    }
}

/// The statistics of every latent, in f64.
pub(crate) struct ReferenceStats {
    rows: OwnedRows,
    /// Of a TopK gate: all latents once more.
    rivals: EncoderRows,
}

impl ReferenceStats {
    pub fn new(d_sae: usize, read: ReadRows<'_>) -> Result<ReferenceStats> {
        let rows = read(0..d_sae)?;
        let rivals = match &rows.gate {
            OwnedGate::TopK(gate) => {
                let (weight, glu) = rows.encoders();
                EncoderRows {
                    d_in: rows.d_in,
                    weight,
                    bias: rows.bias.clone(),
                    rank_gain: gate.gain.clone(),
                    glu,
                    ..EncoderRows::default()
                }
            }
            _ => EncoderRows::default(),
        };
        Ok(ReferenceStats { rows, rivals })
    }
}

impl StatsBackend for ReferenceStats {
    fn numerics(&self) -> String {
        "reference-1".into()
    }

    fn num_threads(&self) -> usize {
        1
    }

    fn takes_f64(&self) -> bool {
        true
    }

    fn workspace_size(&self, _tokens: usize, _has_base: bool) -> usize {
        0
    }

    unsafe fn update(&self, call: &StatsCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { Formulas { rows: self.rows.borrow(), rivals: &self.rivals }.statistics(call) };
        Ok(())
    }
}

/// Steering in f64.
pub(crate) struct ReferenceSteering(pub Directions);

impl SteerBackend for ReferenceSteering {
    fn num_threads(&self) -> usize {
        1
    }

    fn takes_f64(&self) -> bool {
        true
    }

    unsafe fn steer(&self, call: &SteerCall, _: Stream) -> Result<()> {
        for b in 0..call.batch {
            let hidden = call.hidden_of(b);
            for s in 0..call.positions {
                // SAFETY: the caller's promise: position (b, s) and its d_in columns exist.
                unsafe {
                    let Some((row, factor)) = call.push(b, s) else { continue };
                    for (i, direction) in self.0.row(row).iter().enumerate() {
                        let h = load(&hidden, s, i);
                        store(&hidden, s, i, h + factor * *direction as f64);
                    }
                }
            }
        }
        Ok(())
    }
}

/// # Safety
/// As [`Backend`].
pub(crate) unsafe fn token_norms(call: &TokenNormsCall) {
    for t in 0..call.tokens {
        // SAFETY: the caller's promise: token t exists.
        unsafe {
            let squares = load_row(&call.hidden, t, call.d_in).iter().map(|h| h * h).sum::<f64>();
            call.norms.set(t, squares.sqrt());
        }
    }
}

/// # Safety
/// As [`Backend`].
pub(crate) unsafe fn penalty(rows: &Rows<'_>, call: &PenaltyCall) {
    // SAFETY: the caller's promise.
    unsafe { Formulas { rows: *rows, rivals: &EncoderRows::default() }.penalty(call) }
}

/// # Safety
/// As [`Backend`].
pub(crate) unsafe fn backward(rows: &Rows<'_>, call: &BackwardCall) {
    // SAFETY: the caller's promise.
    unsafe { Formulas { rows: *rows, rivals: &EncoderRows::default() }.backward(call) }
}

pub(crate) struct Formulas<'a> {
    pub rows: Rows<'a>,
    /// Of a TopK gate.
    pub rivals: &'a EncoderRows,
}

/// One hidden state h, with all that its latents have in common.
pub(crate) struct Token {
    hidden: Vec<f64>,
    /// a of dot = a · (W · h), and the mean that is taken from h.
    scale: f64,
    mean: f64,
    /// q of da/dh = −a q (h − mean).
    pull: f64,
    /// The k-th largest rank of each group.
    kth: Vec<f64>,
}

/// A latent for one hidden state.
pub(crate) struct Latent {
    pub z: f64,
    /// dz/d(dot), or of a GLU encoder dz/du
    pub slope: f64,
}

/// u = value · sigmoid of a GLU encoder's latent.
struct Pair {
    value: f64,
    sigmoid: f64,
}

impl Formulas<'_> {
    pub fn token(&self, hidden: Vec<f64>) -> Token {
        let d = hidden.len() as f64;
        let mut token = Token { hidden, scale: 1.0, mean: 0.0, pull: 0.0, kth: Vec::new() };
        let centre = |h: &[f64], mean: f64| h.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>();
        match self.rows.norm {
            TokenNorm::None => {}
            TokenNorm::Constant => {
                let square = centre(&token.hidden, 0.0);
                token.scale = (d / square).sqrt();
                token.pull = 1.0 / square;
            }
            TokenNorm::Layer => {
                token.mean = token.hidden.iter().sum::<f64>() / d;
                let deviation = (centre(&token.hidden, token.mean) / (d - 1.0)).sqrt();
                token.scale = 1.0 / (deviation + TokenNorm::EPS);
                token.pull = token.scale / ((d - 1.0) * deviation);
            }
        }
        if let Gate::TopK(gate) = self.rows.gate {
            token.kth = (0..gate.groups()).map(|group| self.kth(gate, group, &token)).collect();
        }
        token
    }

    /// The k-th largest rank of a group; NaN ranks above all.
    fn kth(&self, gate: &TopK, group: usize, token: &Token) -> f64 {
        let row = |weight: &'_ [f32], rival: usize| {
            token.dot(&weight[rival * self.rivals.d_in..][..self.rivals.d_in])
        };
        let rank = |rival: usize| {
            let mut pre = row(&self.rivals.weight, rival) + self.rivals.bias[rival] as f64;
            if let Some(glu) = &self.rivals.glu {
                pre *= sigmoid(row(&glu.weight, rival) + glu.bias[rival] as f64);
            }
            let gain = self.rivals.rank_gain.as_ref().map_or(1.0, |gain| gain[rival]);
            gate.rank(gain as f64 * pre)
        };
        let mut ranks: Vec<f64> = gate.rivals_of(group).map(rank).collect();
        ranks.sort_by(|a, b| b.total_cmp(a));
        ranks[gate.k - 1]
    }

    pub fn latent(&self, k: usize, token: &Token) -> Latent {
        let rows = &self.rows;
        let dot = token.dot(rows.row(k * rows.width()));
        let scale = rows.scale.map_or(1.0, |s| s[k] as f64);
        let pre = match self.pair(k, token) {
            Some(pair) => pair.value * pair.sigmoid,
            None => scale * dot + rows.bias[k] as f64,
        };
        let off = match rows.gate {
            Gate::Open => false,
            Gate::Relu => pre <= 0.0,
            Gate::Threshold(th) => pre <= th[k] as f64,
            Gate::Gated(bias) => dot + bias[k] as f64 <= 0.0 || pre <= 0.0,
            Gate::TopK(gate) => {
                let rank = gate.rank(gate.gain(k) as f64 * pre);
                let lost = rank < token.kth[gate.group[k] as usize];
                lost || (!gate.by_magnitude && pre <= 0.0)
            }
        };
        let (z, slope) = if off { (0.0, 0.0) } else { (pre, scale) };
        Latent { z, slope }
    }

    /// Of a GLU encoder.
    fn pair(&self, k: usize, token: &Token) -> Option<Pair> {
        let rows = &self.rows;
        let gate = |bias: &[f32]| token.dot(rows.row(2 * k + 1)) + bias[k] as f64;
        rows.glu_bias.map(|bias| Pair {
            value: token.dot(rows.row(2 * k)) + rows.bias[k] as f64,
            sigmoid: sigmoid(gate(bias)),
        })
    }

    /// The coefficient of each row's dot product, from those of the latents: a GLU encoder has
    ///
    /// ```text
    /// du/d(dot_2k) = sigmoid(g)      du/d(dot_2k+1) = value · sigmoid(g) · (1 − sigmoid(g))
    /// ```
    fn row_coefs(&self, coef: &[f64], token: Option<&Token>) -> Vec<f64> {
        let Some(token) = token.filter(|_| self.rows.glu_bias.is_some()) else {
            let mut all = vec![0.0; self.rows.products()];
            all[..coef.len()].copy_from_slice(coef);
            return all;
        };
        let of_latent = |(k, c): (usize, &f64)| match self.pair(k, token).filter(|_| *c != 0.0) {
            Some(Pair { value, sigmoid }) => [c * sigmoid, c * value * sigmoid * (1.0 - sigmoid)],
            None => [0.0; 2],
        };
        coef.iter().enumerate().flat_map(of_latent).collect()
    }

    /// # Safety
    /// As [`Backend`].
    unsafe fn encode(&self, call: &EncodeCall) {
        for t in 0..call.tokens {
            // SAFETY: token t and latent k are within the checked shapes.
            unsafe {
                let token = self.token(load_row(&call.hidden, t, self.rows.d_in));
                for k in 0..self.rows.count() {
                    store(&call.latents, t, k, self.latent(k, &token).z);
                }
            }
        }
    }

    /// # Safety
    /// As [`StatsBackend`].
    unsafe fn statistics(&self, call: &StatsCall) {
        let d_in = self.rows.d_in;
        // SAFETY: every index below is within the checked shapes.
        unsafe {
            let mut token_count = 0.0;
            let seen = |hidden: &Matrix, t| self.token(load_row(hidden, t, d_in));
            let tokens = (0..call.tokens).filter_map(|t| {
                let mask = call.mask.map_or(1.0, |m| m.get(t) as f64);
                let base = call.base_hidden.as_ref();
                (mask != 0.0).then(|| (mask, seen(&call.hidden, t), base.map(|base| seen(base, t))))
            });
            let tokens: Vec<(f64, Token, Option<Token>)> = tokens.collect();
            for k in 0..self.rows.count() {
                let at = |row: usize| call.state.row(row).cast::<f64>().add(k);
                let add = |row: usize, x: f64| *at(row) += x;
                let larger = |row: usize, x: f64| {
                    let largest = &mut *at(row);
                    *largest = if x <= *largest || largest.is_nan() { *largest } else { x };
                };
                if !call.accumulate {
                    let all =
                        if call.base_hidden.is_some() { rows::WITH_BASE } else { rows::ALONE };
                    (0..all).for_each(|row| *at(row) = 0.0);
                    [rows::MAX, rows::BASE_MAX]
                        .into_iter()
                        .filter(|row| *row < all)
                        .for_each(|row| *at(row) = f64::NEG_INFINITY);
                }
                for (mask, token, base) in &tokens {
                    let side = |first: usize, z: f64| {
                        add(first + rows::SUM, mask * z);
                        add(first + rows::SQUARE_SUM, mask * z * z);
                        add(first + rows::ACTIVE, if z != 0.0 { *mask } else { 0.0 });
                        larger(first + rows::MAX, z);
                    };
                    let z = self.latent(k, token).z;
                    side(rows::SUM, z);
                    let Some(base) = base else { continue };
                    let base = self.latent(k, base).z;
                    side(rows::BASE_SUM, base);
                    add(rows::RISE_SQUARE_SUM, mask * rectify(z - base).powi(2));
                    add(rows::FALL_SQUARE_SUM, mask * rectify(base - z).powi(2));
                }
            }
            tokens.iter().for_each(|(mask, ..)| token_count += mask);
            if let Some(count) = call.token_count {
                *count = if call.accumulate { *count } else { 0.0 } + token_count;
            }
        }
    }

    /// # Safety
    /// As [`Backend`].
    unsafe fn penalty(&self, call: &PenaltyCall) {
        let rows = &self.rows;
        let count = rows.count();
        let mut coef = vec![0.0; count];
        let mut latent_loss = vec![0.0; count];
        let mut token_count = 0.0;
        // SAFETY: every index below is within the checked shapes.
        unsafe {
            let factor = call.grad.map_or(0.0, |g| g.factor());
            for t in 0..call.tokens {
                let mask = call.mask.map_or(1.0, |m| m.get(t) as f64);
                coef.fill(0.0);
                let mut token = None;
                if mask != 0.0 {
                    let seen = self.token(load_row(&call.hidden, t, rows.d_in));
                    for k in 0..count {
                        let Latent { z, slope } = self.latent(k, &seen);
                        let sign = (rows.sign_weight[k] as f64).signum();
                        let weight = (rows.sign_weight[k] as f64).abs();
                        let rise = rectify(sign * (z - load(&call.reference, t, k)));
                        latent_loss[k] += mask * weight * rise * rise;
                        coef[k] = mask * 2.0 * weight * sign * rise * slope;
                    }
                    token_count += mask;
                    token = Some(seen);
                }
                if let Some(out) = &call.coef {
                    for (k, c) in coef.iter().enumerate() {
                        store(out, t, k, *c);
                    }
                }
                if let Some(grad) = &call.grad {
                    self.gradient_row(grad, factor, t, &coef, token.as_ref());
                }
            }
            if let Some(out) = call.loss_sum {
                out.set(0, latent_loss.iter().sum());
            }
            if let Some(out) = call.token_count {
                out.set(0, token_count);
            }
            if let Some(out) = call.latent_loss {
                for (k, loss) in latent_loss.iter().enumerate() {
                    out.set(k, *loss);
                }
            }
        }
    }

    /// # Safety
    /// As [`Backend`].
    unsafe fn backward(&self, call: &BackwardCall) {
        // SAFETY: every index below is within the checked shapes.
        unsafe {
            let factor = call.grad.factor();
            for t in 0..call.tokens {
                let coef = load_row(&call.coef, t, self.rows.count());
                let hidden = call.hidden.filter(|_| self.rows.backward_needs_hidden());
                let token = hidden.map(|hidden| self.token(load_row(&hidden, t, self.rows.d_in)));
                self.gradient_row(&call.grad, factor, t, &coef, token.as_ref());
            }
        }
    }

    /// dH[t] (+)= factor · Σ_k coef_k · d(dot_k)/dh over all rows, where dot_k = a · (W_k · h):
    ///
    /// ```text
    /// d(dot_k)/dh = a W_k − q dot_k (h − mean)      q = 0 without a norm
    /// ```
    ///
    /// Rows whose coefficient is 0 take no part.
    ///
    /// # Safety
    /// Row t must exist and be writable.
    unsafe fn gradient_row(
        &self,
        grad: &Grad,
        factor: f64,
        t: usize,
        coef: &[f64],
        token: Option<&Token>,
    ) {
        let rows = &self.rows;
        let coef = self.row_coefs(coef, token);
        let active: Vec<usize> = (0..coef.len()).filter(|k| coef[*k] != 0.0).collect();
        if active.is_empty() && grad.accumulate {
            return;
        }
        let scale = token.map_or(1.0, |token| token.scale);
        let moved = token.filter(|token| token.pull != 0.0 && !active.is_empty()).map(|token| {
            let dots = active.iter().map(|k| coef[*k] * token.dot(rows.row(*k)));
            (token, factor * token.pull * dots.sum::<f64>())
        });
        for i in 0..rows.d_in {
            let one = |k: &usize| factor * coef[*k] * scale * rows.row(*k)[i] as f64;
            let mut sum: f64 = active.iter().map(one).sum();
            if let Some((token, pull)) = moved {
                sum -= pull * (token.hidden[i] - token.mean);
            }
            // SAFETY: the caller's promise.
            unsafe {
                let old = if grad.accumulate { load(&grad.rows, t, i) } else { 0.0 };
                store(&grad.rows, t, i, old + sum);
            }
        }
    }
}

impl Token {
    /// a · (row · h); rows are centred where the mean is taken from h.
    fn dot(&self, row: &[f32]) -> f64 {
        let dot: f64 = row.iter().zip(&self.hidden).map(|(w, h)| *w as f64 * h).sum();
        self.scale * dot
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// relu that lets NaN through.
fn rectify(x: f64) -> f64 {
    if x <= 0.0 { 0.0 } else { x }
}

/// # Safety
/// Row t must exist, `len` elements long.
unsafe fn load_row(matrix: &Matrix, t: usize, len: usize) -> Vec<f64> {
    // SAFETY: the caller's promise.
    (0..len).map(|i| unsafe { load(matrix, t, i) }).collect()
}

/// # Safety
/// Element (t, i) must exist.
unsafe fn load(matrix: &Matrix, t: usize, i: usize) -> f64 {
    // SAFETY: the caller's promise; alignment was checked with the view.
    unsafe {
        let row = matrix.row(t);
        match matrix.dtype {
            DType::F64 => *row.cast::<f64>().add(i),
            DType::F32 => *row.cast::<f32>().add(i) as f64,
            DType::F16 => (*row.cast::<f16>().add(i)).to_f64(),
            DType::BF16 => (*row.cast::<bf16>().add(i)).to_f64(),
            DType::U8 | DType::Bool | DType::I64 => unreachable!("checked: not a real dtype"),
        }
    }
}

/// # Safety
/// Element (t, i) must exist and be writable.
unsafe fn store(matrix: &Matrix, t: usize, i: usize, value: f64) {
    // SAFETY: the caller's promise; alignment was checked with the view.
    unsafe {
        let row = matrix.row(t);
        match matrix.dtype {
            DType::F64 => *row.cast::<f64>().add(i) = value,
            DType::F32 => *row.cast::<f32>().add(i) = value as f32,
            DType::F16 => *row.cast::<f16>().add(i) = f16::from_f64(value),
            DType::BF16 => *row.cast::<bf16>().add(i) = bf16::from_f64(value),
            DType::U8 | DType::Bool | DType::I64 => unreachable!("checked: not a real dtype"),
        }
    }
}
