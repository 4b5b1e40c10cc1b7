//! Where the work runs. A backend gets checked arguments only: `penalty.rs` has compared every
//! shape, dtype, stride and alignment before a backend sees a pointer.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod glu;
#[cfg(test)]
pub(crate) mod random;
pub(crate) mod reference;

use std::ops::Range;

use crate::error::Result;
use crate::sae::{EncoderRows, GluRows, TokenNorm};
use crate::tensor::{DType, Stream};

/// Encoder rows of one latent set with the gate that the plan's activation chose, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub d_in: usize,
    /// [K · width, d_in] with `weight_stride` elements from row to row.
    pub weight: &'a [f32],
    pub weight_stride: usize,
    /// [K]
    pub bias: &'a [f32],
    /// [K] or absent: pre = scale · dot + bias, where dot = a · (weight · h).
    pub scale: Option<&'a [f32]>,
    /// [K] or absent: latent k of a GLU encoder has rows 2k and 2k + 1, and no scale:
    /// pre = (dot_2k + bias) · sigmoid(dot_2k+1 + glu_bias).
    pub glu_bias: Option<&'a [f32]>,
    /// What a is; 1 without.
    pub norm: TokenNorm,
    pub gate: Gate<'a>,
    /// [K]: s_k · w_k.
    pub sign_weight: &'a [f32],
}

impl Rows<'_> {
    /// K
    pub fn count(&self) -> usize {
        self.bias.len()
    }

    /// Rows of each latent.
    pub fn width(&self) -> usize {
        if self.glu_bias.is_some() { 2 } else { 1 }
    }

    /// Rows of all latents, and so dot products of a token.
    pub fn products(&self) -> usize {
        self.count() * self.width()
    }

    /// The slope of a latent is not its rows' alone.
    pub fn backward_needs_hidden(&self) -> bool {
        self.norm != TokenNorm::None || self.glu_bias.is_some()
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.weight[row * self.weight_stride..][..self.d_in]
    }

    /// Copies of all but the weights.
    pub fn without_weight(&self) -> OwnedRows {
        OwnedRows {
            d_in: self.d_in,
            weight: Vec::new(),
            bias: self.bias.to_vec(),
            scale: self.scale.map(<[f32]>::to_vec),
            glu_bias: self.glu_bias.map(<[f32]>::to_vec),
            norm: self.norm,
            gate: match self.gate {
                Gate::Open => OwnedGate::Open,
                Gate::Relu => OwnedGate::Relu,
                Gate::Threshold(th) => OwnedGate::Threshold(th.to_vec()),
                Gate::Gated(bias) => OwnedGate::Gated(bias.to_vec()),
                Gate::TopK(gate) => OwnedGate::TopK(gate.clone()),
            },
            sign_weight: self.sign_weight.to_vec(),
        }
    }

    /// Copies of some of the rows, all but the weights. A TopK gate keeps all of its rivals.
    pub fn part_without_weight(&self, range: Range<usize>) -> OwnedRows {
        let of = |values: &[f32]| values[range.clone()].to_vec();
        OwnedRows {
            d_in: self.d_in,
            weight: Vec::new(),
            bias: of(self.bias),
            scale: self.scale.map(of),
            glu_bias: self.glu_bias.map(of),
            norm: self.norm,
            gate: match self.gate {
                Gate::Open => OwnedGate::Open,
                Gate::Relu => OwnedGate::Relu,
                Gate::Threshold(th) => OwnedGate::Threshold(of(th)),
                Gate::Gated(bias) => OwnedGate::Gated(of(bias)),
                Gate::TopK(gate) => OwnedGate::TopK(gate.part(range.clone())),
            },
            sign_weight: of(self.sign_weight),
        }
    }
}

/// From pre-activation to latent. NaN passes every gate.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gate<'a> {
    /// z = pre
    Open,
    /// z = pre <= 0 ? 0 : pre
    Relu,
    /// z = pre <= th ? 0 : pre
    Threshold(&'a [f32]),
    /// z = (dot + bias <= 0 or pre <= 0) ? 0 : pre
    Gated(&'a [f32]),
    TopK(&'a TopK),
}

/// A latent is on if it is among the k largest of its group, which has rivals beyond the blocked
/// ones: z = rank <= th ? 0 : pre, where th is just below the k-th largest rank of the token's group.
/// So all of those that share the k-th place are on.
#[derive(Clone, Debug)]
pub(crate) struct TopK {
    pub k: usize,
    /// [K]
    pub group: Vec<u32>,
    /// Rivals of group g: group_ends[g - 1]..group_ends[g].
    pub group_ends: Vec<usize>,
    /// rank = |pre|; else rank = pre, and th is at least 0.
    pub by_magnitude: bool,
    /// [K] or absent: ranks are those of gain · pre. Rivals bring their own.
    pub gain: Option<Vec<f32>>,
}

impl TopK {
    pub fn groups(&self) -> usize {
        self.group_ends.len()
    }

    /// How many there are in all.
    pub fn rivals(&self) -> usize {
        self.group_ends.last().copied().unwrap_or(0)
    }

    /// What places a latent in its group, from gain · pre; NaN comes first.
    pub fn rank(&self, pre: f64) -> f64 {
        match self.by_magnitude {
            _ if pre.is_nan() => f64::INFINITY,
            true => pre.abs(),
            false => pre,
        }
    }

    /// Of blocked latent k.
    pub fn gain(&self, k: usize) -> f32 {
        self.gain.as_ref().map_or(1.0, |gain| gain[k])
    }

    pub fn rivals_of(&self, group: usize) -> Range<usize> {
        let start = if group == 0 { 0 } else { self.group_ends[group - 1] };
        start..self.group_ends[group]
    }

    /// The gate of some of the latents; their rivals stay.
    pub fn part(&self, range: Range<usize>) -> TopK {
        TopK {
            k: self.k,
            group: self.group[range.clone()].to_vec(),
            group_ends: self.group_ends.clone(),
            by_magnitude: self.by_magnitude,
            gain: self.gain.as_ref().map(|gain| gain[range].to_vec()),
        }
    }
}

/// The k-th largest rank; below everything where there are fewer. Puts the k largest first.
pub(crate) fn kth_largest(ranks: &mut [f32], k: usize) -> f32 {
    if ranks.len() < k {
        return f32::NEG_INFINITY;
    }
    *ranks.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// What a rank must be above: just below the k-th largest, and not below 0 where latents are
/// rectified.
pub(crate) fn rank_threshold(kth: f32, by_magnitude: bool) -> f32 {
    let below = kth.next_down();
    if by_magnitude { below } else { below.max(0.0) }
}

/// Folded rows of a range of [`TopK`]'s rivals. A backend reads each once, in order.
pub(crate) type ReadRivals<'a> = &'a dyn Fn(Range<usize>) -> Result<EncoderRows>;

/// Rivals that are read at a time: in a file that holds latents as columns, bands that are worth a
/// read each.
pub(crate) const RIVALS_AT_ONCE: usize = 2048;

/// The size of something of about `a` times `b` elements, or more than any memory has where the
/// arithmetic would overflow.
pub(crate) fn bounded(a: usize, b: usize, size: impl FnOnce() -> usize) -> usize {
    const MOST: usize = 1 << 44;
    match a.max(64).checked_mul(b.max(64)) {
        Some(product) if product <= MOST => size(),
        _ => isize::MAX as usize,
    }
}

/// Rows of a range of a dictionary's latents. A backend reads each once, in order.
pub(crate) type ReadRows<'a> = &'a dyn Fn(Range<usize>) -> Result<OwnedRows>;

/// [`Rows`] that own their arrays.
pub(crate) struct OwnedRows {
    pub d_in: usize,
    /// [K · width, d_in], or empty where a backend keeps the weights in a form of its own.
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub scale: Option<Vec<f32>>,
    pub glu_bias: Option<Vec<f32>>,
    pub norm: TokenNorm,
    pub gate: OwnedGate,
    pub sign_weight: Vec<f32>,
}

pub(crate) enum OwnedGate {
    Open,
    Relu,
    Threshold(Vec<f32>),
    Gated(Vec<f32>),
    TopK(TopK),
}

/// Weights with the rows of a GLU encoder's latent side by side, and the biases of its second ones.
pub(crate) fn side_by_side(
    weight: Vec<f32>,
    glu: Option<GluRows>,
    d_in: usize,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let Some(glu) = glu else { return (weight, None) };
    let pairs = weight.chunks_exact(d_in).zip(glu.weight.chunks_exact(d_in));
    (pairs.flat_map(|(value, gate)| [value, gate]).flatten().copied().collect(), Some(glu.bias))
}

impl OwnedRows {
    /// What [`side_by_side`] had: weights of the first rows, and the second ones.
    pub fn encoders(&self) -> (Vec<f32>, Option<GluRows>) {
        let Some(bias) = &self.glu_bias else { return (self.weight.clone(), None) };
        let every_other = |first: usize| {
            self.weight.chunks_exact(self.d_in).skip(first).step_by(2).flatten().copied().collect()
        };
        (every_other(0), Some(GluRows { weight: every_other(1), bias: bias.clone() }))
    }

    pub fn borrow(&self) -> Rows<'_> {
        Rows {
            d_in: self.d_in,
            weight: &self.weight,
            weight_stride: self.d_in,
            bias: &self.bias,
            scale: self.scale.as_deref(),
            glu_bias: self.glu_bias.as_deref(),
            norm: self.norm,
            gate: match &self.gate {
                OwnedGate::Open => Gate::Open,
                OwnedGate::Relu => Gate::Relu,
                OwnedGate::Threshold(th) => Gate::Threshold(th),
                OwnedGate::Gated(bias) => Gate::Gated(bias),
                OwnedGate::TopK(gate) => Gate::TopK(gate),
            },
            sign_weight: &self.sign_weight,
        }
    }
}

/// Rows of a matrix in caller memory: unit stride inside a row, aligned to the element.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub data: *mut u8,
    pub dtype: DType,
    /// Elements from row to row.
    pub row_stride: usize,
}

impl Matrix {
    /// # Safety
    /// Row `t` must exist.
    pub unsafe fn row(&self, t: usize) -> *mut u8 {
        // SAFETY: the caller's promise; the view's extent was checked against overflow.
        unsafe { self.data.add(t * self.row_stride * self.dtype.size()) }
    }
}

/// One value per token; absent means every token counts once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    pub data: *const u8,
    /// U8, Bool (non-zero counts once) or F32 (the value is the token's share).
    pub dtype: DType,
    pub stride: usize,
}

impl Mask {
    /// # Safety
    /// Token `t` must exist.
    pub unsafe fn get(&self, t: usize) -> f32 {
        let at = t * self.stride;
        // SAFETY: the caller's promise; alignment was checked.
        unsafe {
            match self.dtype {
                DType::F32 => *self.data.cast::<f32>().add(at),
                _ => (*self.data.add(at) != 0) as u8 as f32,
            }
        }
    }
}

/// An output of one or more numbers, F32 or F64.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub data: *mut u8,
    pub dtype: DType,
    pub stride: usize,
}

impl Output {
    /// # Safety
    /// Element `i` must exist.
    pub unsafe fn set(&self, i: usize, value: f64) {
        // SAFETY: the caller's promise; alignment was checked.
        unsafe {
            match self.dtype {
                DType::F64 => *self.data.cast::<f64>().add(i * self.stride) = value,
                _ => *self.data.cast::<f32>().add(i * self.stride) = value as f32,
            }
        }
    }
}

/// dH: overwritten, or added to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grad {
    pub rows: Matrix,
    pub accumulate: bool,
    /// Host factor times the factor that is read when the work runs.
    pub scale: f64,
    pub scale_tensor: Option<*const f32>,
}

impl Grad {
    /// # Safety
    /// The scale tensor must be readable now.
    pub unsafe fn factor(&self) -> f64 {
        // SAFETY: the caller's promise.
        self.scale * self.scale_tensor.map_or(1.0, |p| unsafe { *p } as f64)
    }
}

/// z of every token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncodeCall {
    pub tokens: usize,
    pub hidden: Matrix,
    pub latents: Matrix,
    /// Empty unless the gate is [`Gate::TopK`], the encoder a GLU's, or on CUDA if rows have a
    /// [`TokenNorm`].
    pub workspace: Workspace,
}

/// Loss, and with `grad` also dH in the same pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PenaltyCall {
    pub tokens: usize,
    pub hidden: Matrix,
    pub reference: Matrix,
    pub mask: Option<Mask>,
    pub coef: Option<Matrix>,
    pub loss_sum: Option<Output>,
    pub token_count: Option<Output>,
    pub latent_loss: Option<Output>,
    pub grad: Option<Grad>,
    pub workspace: Workspace,
}

/// dH from the coefficients that forward saved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardCall {
    pub tokens: usize,
    pub coef: Matrix,
    pub grad: Grad,
    /// Given if [`Rows::backward_needs_hidden`], as is the workspace.
    pub hidden: Option<Matrix>,
    pub workspace: Workspace,
}

/// Sums over tokens for every latent of a dictionary: the formulas of `stats.rs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StatsCall {
    pub tokens: usize,
    pub hidden: Matrix,
    pub base_hidden: Option<Matrix>,
    pub mask: Option<Mask>,
    /// [rows of `stats.rs`, F] F64
    pub state: Matrix,
    pub token_count: Option<*mut f64>,
    pub accumulate: bool,
    pub workspace: Workspace,
}

/// Numbers of the caller, one for each row of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column<T> {
    pub data: *const T,
    pub stride: usize,
}

impl<T: Copy> Column<T> {
    /// # Safety
    /// Element `i` must exist.
    pub unsafe fn get(&self, i: usize) -> T {
        // SAFETY: the caller's promise; alignment was checked.
        unsafe { *self.data.add(i * self.stride) }
    }
}

/// Hidden states of a batch, pushed along directions: the formula of `steer.rs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SteerCall {
    /// B
    pub batch: usize,
    /// S
    pub positions: usize,
    /// Positions [S, d] of the first row of the batch.
    pub hidden: Matrix,
    /// Elements from one row of the batch to the next.
    pub hidden_stride: usize,
    /// Which direction; -1 for none. On the CPU no other is out of range.
    pub row: Column<i64>,
    pub strength: Column<f32>,
    /// Of the first row of the batch.
    pub mask: Option<Mask>,
    pub mask_stride: usize,
    pub scale: f64,
    pub scale_tensor: Option<*const f32>,
}

impl SteerCall {
    /// The positions of a row of the batch.
    pub fn hidden_of(&self, b: usize) -> Matrix {
        let bytes = b * self.hidden_stride * self.hidden.dtype.size();
        Matrix { data: self.hidden.data.wrapping_add(bytes), ..self.hidden }
    }

    /// Which direction a position is pushed along and how far, if at all.
    ///
    /// # Safety
    /// Position (b, s) must exist, and everything that the call points to be readable now.
    pub unsafe fn push(&self, b: usize, s: usize) -> Option<(usize, f64)> {
        // SAFETY: the caller's promise.
        unsafe {
            let share = self.mask.map_or(1.0, |mask| {
                let bytes = b * self.mask_stride * mask.dtype.size();
                Mask { data: mask.data.wrapping_add(bytes), ..mask }.get(s)
            });
            let (row, strength) = (self.row.get(b), self.strength.get(b));
            if row < 0 || share == 0.0 || strength == 0.0 {
                return None;
            }
            let scale = self.scale * self.scale_tensor.map_or(1.0, |p| *p as f64);
            Some((row as usize, strength as f64 * scale * share as f64))
        }
    }
}

/// The norm of every token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenNormsCall {
    pub tokens: usize,
    pub d_in: usize,
    pub hidden: Matrix,
    pub norms: Output,
}

/// Scratch memory of at least `workspace_size` bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workspace {
    pub data: *mut u8,
    pub size: usize,
}

impl Workspace {
    pub const NONE: Workspace = Workspace { data: std::ptr::null_mut(), size: 0 };
}

/// The three run calls on checked arguments. On the CPU they return when the work is done; on CUDA
/// they put it on the stream.
///
/// # Safety
/// Every pointer in a call must be valid for its shape until the work is done, and outputs must
/// not overlap anything else in it.
pub(crate) trait Backend: Send + Sync {
    /// Names the numbers: two backends with one name give the same z, bit for bit.
    fn numerics(&self) -> String;

    /// Worker threads of a run call.
    fn num_threads(&self) -> usize;

    /// Whether hidden, latents, reference and coef may be F64.
    fn takes_f64(&self) -> bool {
        false
    }

    /// Whether work that is put on a stream runs where this backend's rows are.
    fn owns_stream(&self, stream: Stream) -> Result<bool> {
        Ok(stream == Stream::NULL)
    }

    /// Bytes of scratch that any call needs for this many tokens.
    fn workspace_size(&self, tokens: usize) -> usize;

    /// What brings host arrays to the device; `None` where calls take them as they are.
    fn transfers(&self) -> Result<Option<cuda::Transfers>> {
        Ok(None)
    }

    unsafe fn encode(&self, call: &EncodeCall, stream: Stream) -> Result<()>;
    unsafe fn penalty(&self, call: &PenaltyCall, stream: Stream) -> Result<()>;
    unsafe fn backward(&self, call: &BackwardCall, stream: Stream) -> Result<()>;
}

/// All latents of a dictionary on a device, and the sums over tokens of each.
pub(crate) trait StatsBackend: Send + Sync {
    /// As [`Backend::numerics`]: z has the bits of a plan of that name.
    fn numerics(&self) -> String;

    /// Worker threads of a run call.
    fn num_threads(&self) -> usize;

    /// Whether hidden states may be F64.
    fn takes_f64(&self) -> bool {
        false
    }

    /// Bytes of scratch that a call needs for this many tokens, with the base's hidden states or
    /// without.
    fn workspace_size(&self, tokens: usize, has_base: bool) -> usize;

    /// # Safety
    /// As [`Backend`].
    unsafe fn update(&self, call: &StatsCall, stream: Stream) -> Result<()>;
}

/// Directions on a device, and what pushes hidden states along them.
pub(crate) trait SteerBackend: Send + Sync {
    /// Worker threads of a run call.
    fn num_threads(&self) -> usize;

    /// Whether hidden states may be F64.
    fn takes_f64(&self) -> bool {
        false
    }

    /// # Safety
    /// As [`Backend`]; on the CPU every row is below the number of directions.
    unsafe fn steer(&self, call: &SteerCall, stream: Stream) -> Result<()>;
}

/// Unit vectors of d_in columns, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Directions {
    pub d_in: usize,
    /// [n, d_in]
    pub rows: Vec<f32>,
}

impl Directions {
    pub fn count(&self) -> usize {
        self.rows.len() / self.d_in
    }

    pub fn row(&self, n: usize) -> &[f32] {
        &self.rows[n * self.d_in..][..self.d_in]
    }
}
