//! The oracle: the formulas in f64, one token at a time, in the order in which they are written.
//! Slow and obvious; every other backend is compared with it.

use half::{bf16, f16};

use super::{Backend, BackwardCall, EncodeCall, Gate, Grad, Matrix, OwnedRows, PenaltyCall, Rows};
use crate::error::Result;
use crate::tensor::{DType, Stream};

pub(crate) struct Reference {
    rows: OwnedRows,
}

impl Reference {
    pub fn new(rows: OwnedRows) -> Reference {
        Reference { rows }
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
        unsafe { encode(&self.rows.borrow(), call) };
        Ok(())
    }

    unsafe fn penalty(&self, call: &PenaltyCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { penalty(&self.rows.borrow(), call) };
        Ok(())
    }

    unsafe fn backward(&self, call: &BackwardCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { backward(&self.rows.borrow(), call) };
        Ok(())
    }
}

/// z and act' of one latent for one hidden state.
pub(crate) fn latent(rows: &Rows<'_>, k: usize, hidden: &[f64]) -> (f64, f64) {
    let dot: f64 = rows.row(k).iter().zip(hidden).map(|(w, h)| *w as f64 * h).sum();
    let scale = rows.scale.map_or(1.0, |s| s[k] as f64);
    let pre = scale * dot + rows.bias[k] as f64;
    let off = match rows.gate {
        Gate::Open => false,
        Gate::Relu => pre <= 0.0,
        Gate::Threshold(th) => pre <= th[k] as f64,
        Gate::Gated(bias) => dot + bias[k] as f64 <= 0.0 || pre <= 0.0,
    };
    if off { (0.0, 0.0) } else { (pre, scale) }
}

/// # Safety
/// As [`Backend`].
pub(crate) unsafe fn encode(rows: &Rows<'_>, call: &EncodeCall) {
    let mut hidden = vec![0.0; rows.d_in];
    for t in 0..call.tokens {
        // SAFETY: token t and latent k are within the checked shapes.
        unsafe {
            load_row(&call.hidden, t, &mut hidden);
            for k in 0..rows.count() {
                store(&call.latents, t, k, latent(rows, k, &hidden).0);
            }
        }
    }
}

/// # Safety
/// As [`Backend`].
pub(crate) unsafe fn penalty(rows: &Rows<'_>, call: &PenaltyCall) {
    let (d, count) = (rows.d_in, rows.count());
    let mut hidden = vec![0.0; d];
    let mut coef = vec![0.0; count];
    let mut latent_loss = vec![0.0; count];
    let mut token_count = 0.0;
    // SAFETY: every index below is within the checked shapes.
    unsafe {
        let factor = call.grad.map_or(0.0, |g| g.factor());
        for t in 0..call.tokens {
            let mask = call.mask.map_or(1.0, |m| m.get(t) as f64);
            coef.fill(0.0);
            if mask != 0.0 {
                load_row(&call.hidden, t, &mut hidden);
                for k in 0..count {
                    let (z, slope) = latent(rows, k, &hidden);
                    let sign = (rows.sign_weight[k] as f64).signum();
                    let weight = (rows.sign_weight[k] as f64).abs();
                    let rise = rectify(sign * (z - load(&call.reference, t, k)));
                    latent_loss[k] += mask * weight * rise * rise;
                    coef[k] = mask * 2.0 * weight * sign * rise * slope;
                }
                token_count += mask;
            }
            if let Some(out) = &call.coef {
                for (k, c) in coef.iter().enumerate() {
                    store(out, t, k, *c);
                }
            }
            if let Some(grad) = &call.grad {
                gradient_row(rows, grad, factor, t, &coef);
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
pub(crate) unsafe fn backward(rows: &Rows<'_>, call: &BackwardCall) {
    let mut coef = vec![0.0; rows.count()];
    // SAFETY: every index below is within the checked shapes.
    unsafe {
        let factor = call.grad.factor();
        for t in 0..call.tokens {
            load_row(&call.coef, t, &mut coef);
            gradient_row(rows, &call.grad, factor, t, &coef);
        }
    }
}

/// dH[t] (+)= factor · Σ_k coef_k · W_k; latents whose coefficient is 0 take no part.
///
/// # Safety
/// Row t must exist and be writable.
unsafe fn gradient_row(rows: &Rows<'_>, grad: &Grad, factor: f64, t: usize, coef: &[f64]) {
    let active: Vec<usize> = (0..coef.len()).filter(|k| coef[*k] != 0.0).collect();
    if active.is_empty() && grad.accumulate {
        return;
    }
    for i in 0..rows.d_in {
        let sum: f64 = active.iter().map(|k| factor * coef[*k] * rows.row(*k)[i] as f64).sum();
        // SAFETY: the caller's promise.
        unsafe {
            let old = if grad.accumulate { load(&grad.rows, t, i) } else { 0.0 };
            store(&grad.rows, t, i, old + sum);
        }
    }
}

/// relu that lets NaN through.
fn rectify(x: f64) -> f64 {
    if x <= 0.0 { 0.0 } else { x }
}

unsafe fn load_row(matrix: &Matrix, t: usize, row: &mut [f64]) {
    for (i, value) in row.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *value = unsafe { load(matrix, t, i) };
    }
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
