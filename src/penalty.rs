//! The penalty: what is computed, and the checks between the caller and a backend.
//!
//! For tokens t with mask m_t, blocked latents k with sign s_k and weight w_k:
//!
//! ```text
//! z[t,k]    = act(W_k · h_t + b_k)
//! loss_sum  = Σ_t m_t Σ_k w_k · relu(s_k (z[t,k] − zref[t,k]))²
//! count     = Σ_t m_t
//! coef[t,k] = m_t · 2 w_k s_k relu(s_k (z − zref)) · act'(pre)
//! dH[t,:] (+)= scale · Σ_k coef[t,k] · W_k
//! ```
//!
//! A token norm or a GLU encoder makes the pre-activation another function of h; coef is still what
//! stands before its gradient, and dH is exact.
//!
//! This is L_block of BLOCK-EM (arXiv 2602.00767) before its mean over tokens: a trainer minimises
//! SFT + λ · loss_sum / count. NaN reaches the loss; a token with m_t = 0 contributes nothing, even
//! if its h is NaN.

use std::marker::PhantomData;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, DeviceRows, GateKind, RawDeviceRows};
use crate::backend::{
    BackwardCall, EncodeCall, Gate, Grad, Mask, Matrix, Output, PenaltyCall, Rows, Workspace,
    reference,
};
use crate::error::{Result, bail};
use crate::plan::{BackendKind, Part, Plan, resolve_backend};
use crate::sae::TokenNorm;
use crate::tensor::{DType, Device, Stream, Tensor, TensorMut};

/// Arguments of [`Plan::encode`].
#[derive(Debug)]
pub struct EncodeArgs<'a> {
    /// [T, d] F32, F16 or BF16.
    pub hidden: Tensor<'a>,
    /// [T, K] F32, written.
    pub latents: TensorMut<'a>,
    /// At least [`Plan::workspace_size`] bytes if [`Plan::encode_needs_workspace`].
    pub workspace: Scratch<'a>,
}

impl<'a> EncodeArgs<'a> {
    /// Without a workspace.
    pub fn new(hidden: Tensor<'a>, latents: TensorMut<'a>) -> EncodeArgs<'a> {
        EncodeArgs { hidden, latents, workspace: Scratch::NONE }
    }
}

/// Arguments of [`Plan::forward`], [`Plan::backward`] and [`Plan::penalty`].
#[derive(Debug)]
pub struct PenaltyArgs<'a> {
    /// [T, d] F32, F16 or BF16. Read by forward and penalty.
    pub hidden: Option<Tensor<'a>>,
    /// [T, K] F32: z of the base model. Read by forward and penalty.
    pub reference: Option<Tensor<'a>>,
    /// [T] U8, Bool or F32; absent means that every token counts once.
    pub mask: Option<Tensor<'a>>,
    /// [T, K] F32: written by forward and (if given) penalty, read by backward.
    pub coef: Option<TensorMut<'a>>,
    /// [1] F32 or F64.
    pub loss_sum: Option<TensorMut<'a>>,
    /// [1] F32 or F64.
    pub token_count: Option<TensorMut<'a>>,
    /// [K] F32 or F64: the share of each latent in loss_sum.
    pub latent_loss: Option<TensorMut<'a>>,
    /// [T, d] F32 or hidden's dtype. Written by backward and penalty.
    pub grad_hidden: Option<TensorMut<'a>>,
    /// Add to grad_hidden instead of overwriting it.
    pub accumulate: bool,
    /// Multiplies dH.
    pub scale: f64,
    /// [1] F32: multiplies dH too, read when the work runs.
    pub scale_tensor: Option<Tensor<'a>>,
    /// At least [`Plan::workspace_size`] bytes for forward and penalty, and for backward if
    /// [`Plan::backward_needs_hidden`].
    pub workspace: Scratch<'a>,
}

/// Memory on the device of a call, for intermediate results.
#[derive(Debug)]
pub struct Scratch<'a> {
    data: *mut u8,
    size: usize,
    borrow: PhantomData<&'a mut [u8]>,
}

impl Scratch<'_> {
    pub const NONE: Scratch<'static> =
        Scratch { data: std::ptr::null_mut(), size: 0, borrow: PhantomData };

    /// # Safety
    /// So many bytes must be writable on the call's device until its work is done, and nothing else
    /// may touch them.
    pub unsafe fn from_raw(data: *mut u8, size: usize) -> Self {
        Scratch { data, size, borrow: PhantomData }
    }

    fn workspace(&self) -> Workspace {
        Workspace { data: self.data, size: self.size }
    }

    /// Its bytes, to compare addresses with.
    pub(crate) fn view(&self) -> Result<Tensor<'_>> {
        // SAFETY: nothing is read through it.
        unsafe { Tensor::from_raw(self.data, DType::U8, Device::Cpu, &[self.size], &[1]) }
    }
}

impl<'a> From<&'a mut [u8]> for Scratch<'a> {
    fn from(memory: &'a mut [u8]) -> Scratch<'a> {
        Scratch { data: memory.as_mut_ptr(), size: memory.len(), borrow: PhantomData }
    }
}

// SAFETY: a unique borrow of plain bytes.
unsafe impl Send for Scratch<'_> {}

impl Default for PenaltyArgs<'_> {
    fn default() -> Self {
        PenaltyArgs {
            hidden: None,
            reference: None,
            mask: None,
            coef: None,
            loss_sum: None,
            token_count: None,
            latent_loss: None,
            grad_hidden: None,
            accumulate: false,
            scale: 1.0,
            scale_tensor: None,
            workspace: Scratch::NONE,
        }
    }
}

/// Rows of a handle-free call.
#[derive(Debug)]
pub struct RawRows<'a> {
    /// [K, d] F32, unit stride inside a row.
    pub weight: Tensor<'a>,
    /// [K] F32, contiguous, as are all below.
    pub bias: Tensor<'a>,
    /// [K] F32: s_k · w_k.
    pub sign_weight: Tensor<'a>,
    pub kind: RawActivation,
    /// [K] F32, JumpReLU only.
    pub threshold: Option<Tensor<'a>>,
    /// [K] F32, gated only.
    pub gate_bias: Option<Tensor<'a>>,
    /// [K] F32: pre = gate_scale · (weight · h) + bias; absent means 1.
    pub gate_scale: Option<Tensor<'a>>,
}

pub(crate) type NamedTensor<'a> = (&'static str, Option<Tensor<'a>>);

impl<'a> RawRows<'a> {
    fn named(&self) -> [NamedTensor<'a>; 6] {
        [
            ("weight", Some(self.weight)),
            ("bias", Some(self.bias)),
            ("sign_weight", Some(self.sign_weight)),
            ("threshold", self.threshold),
            ("gate_bias", self.gate_bias),
            ("gate_scale", self.gate_scale),
        ]
    }
}

/// The gate of a handle-free call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum RawActivation {
    Relu = 0,
    JumpRelu = 1,
    Gated = 2,
    // 3 is TopK, which needs the whole dictionary.
    Preactivation = 4,
}

impl RawActivation {
    pub fn from_code(code: i32) -> Option<RawActivation> {
        use RawActivation::*;
        [Relu, JumpRelu, Gated, Preactivation].into_iter().find(|a| *a as i32 == code)
    }
}

impl Plan {
    /// z of every token: references for later calls.
    pub fn encode(&self, args: &mut EncodeArgs<'_>) -> Result<()> {
        self.encode_on(Stream::NULL, args)
    }

    /// loss_sum, count, coefficients for [`Plan::backward`], per-latent sums.
    pub fn forward(&self, args: &mut PenaltyArgs<'_>) -> Result<()> {
        self.forward_on(Stream::NULL, args)
    }

    /// dH from the coefficients that forward saved.
    pub fn backward(&self, args: &mut PenaltyArgs<'_>) -> Result<()> {
        self.backward_on(Stream::NULL, args)
    }

    /// Forward and backward in one pass over hidden.
    pub fn penalty(&self, args: &mut PenaltyArgs<'_>) -> Result<()> {
        self.penalty_on(Stream::NULL, args)
    }

    /// [`Plan::encode`] on a CUDA stream, as the three that follow: they return when the work is on
    /// the stream, and every tensor must live until it is done.
    pub fn encode_on(&self, stream: Stream, args: &mut EncodeArgs<'_>) -> Result<()> {
        let call = self.shape().encode_call(args)?;
        let workspace = match self.encode_needs_workspace() {
            true => checked_workspace(&args.workspace, self.workspace_size(call.tokens))?,
            false => Workspace::NONE,
        };
        // SAFETY: `encode_call` checked every view against the plan.
        unsafe { self.backend.encode(&EncodeCall { workspace, ..call }, stream) }
    }

    pub fn forward_on(&self, stream: Stream, args: &mut PenaltyArgs<'_>) -> Result<()> {
        self.penalty_call(stream, args, false)
    }

    pub fn backward_on(&self, stream: Stream, args: &mut PenaltyArgs<'_>) -> Result<()> {
        let call = self.shape().backward_call(args, &[])?;
        let (hidden, workspace) = match (self.backward_needs_hidden(), call.hidden) {
            (false, _) => (None, Workspace::NONE),
            (true, Some(_)) => {
                let needed = self.workspace_size(call.tokens);
                (call.hidden, checked_workspace(&args.workspace, needed)?)
            }
            (true, None) => bail!(
                NullPointer,
                "hidden is required by the backward call of this plan: its SAE normalises every \
                 token or gates every latent, and the gradient depends on the norm or the gate"
            ),
        };
        // SAFETY: `backward_call` checked every view against the plan.
        unsafe { self.backend.backward(&BackwardCall { hidden, workspace, ..call }, stream) }
    }

    pub fn penalty_on(&self, stream: Stream, args: &mut PenaltyArgs<'_>) -> Result<()> {
        self.penalty_call(stream, args, true)
    }

    fn penalty_call(&self, stream: Stream, args: &PenaltyArgs<'_>, with_grad: bool) -> Result<()> {
        if matches!(self.part(), Part::Columns { .. }) {
            bail!(
                Unsupported,
                "some columns of hidden have no penalty: add up what encode gives over the \
                 processes, and call a plan of the part GATE with the sums as hidden"
            );
        }
        let call = self.shape().penalty_call(args, with_grad, &[])?;
        let needed = self.workspace_size(call.tokens);
        let workspace = checked_workspace(&args.workspace, needed)?;
        // SAFETY: `penalty_call` checked every view against the plan.
        unsafe { self.backend.penalty(&PenaltyCall { workspace, ..call }, stream) }
    }

    fn shape(&self) -> CallShape {
        CallShape {
            d_in: self.d_in(),
            num_latents: self.num_latents(),
            device: self.device(),
            takes_f64: self.backend.takes_f64(),
        }
    }
}

/// Forward without handles: every array is an argument. Same bits as a plan of the same rows.
/// On the CPU an empty workspace is allocated for the call; on CUDA the workspace must be given,
/// and the first call in a context loads the kernels.
pub fn raw_forward(
    rows: &RawRows<'_>,
    args: &mut PenaltyArgs<'_>,
    backend: BackendKind,
    num_threads: usize,
    stream: Stream,
) -> Result<()> {
    let RawCall { kind, shape, arrays } = RawCall::check(rows, backend)?;
    let with_grad = args.grad_hidden.is_some();
    let call = shape.penalty_call(args, with_grad, &rows.named())?;
    match kind {
        BackendKind::Reference => {
            // SAFETY: `penalty_call` checked every view against the rows.
            unsafe { reference::penalty(&arrays.host_rows(&shape), &call) };
            Ok(())
        }
        BackendKind::Cuda => {
            let rows = arrays.device_rows(&shape)?;
            let workspace = shape.raw_workspace(&args.workspace, call.tokens)?;
            // SAFETY: as above.
            unsafe { cuda::raw_penalty(&rows, &PenaltyCall { workspace, ..call }, stream) }
        }
        BackendKind::Auto | BackendKind::Cpu => {
            let rows = arrays.host_rows(&shape);
            let needed = Cpu::raw_workspace_size(rows.count(), rows.d_in, call.tokens, num_threads);
            let mut own = Vec::new();
            let workspace = checked_or_own(&args.workspace, &mut own, needed)?;
            // SAFETY: as above.
            unsafe { Cpu::raw_penalty(&rows, &PenaltyCall { workspace, ..call }, num_threads) };
            Ok(())
        }
    }
}

/// Backward without handles; see [`raw_forward`].
pub fn raw_backward(
    rows: &RawRows<'_>,
    args: &mut PenaltyArgs<'_>,
    backend: BackendKind,
    num_threads: usize,
    stream: Stream,
) -> Result<()> {
    let RawCall { kind, shape, arrays } = RawCall::check(rows, backend)?;
    let call = shape.backward_call(args, &rows.named())?;
    match kind {
        BackendKind::Reference => {
            // SAFETY: `backward_call` checked every view against the rows.
            unsafe { reference::backward(&arrays.host_rows(&shape), &call) };
            Ok(())
        }
        BackendKind::Cuda => {
            let rows = arrays.device_rows(&shape)?;
            let workspace = shape.raw_workspace(&args.workspace, call.tokens)?;
            // SAFETY: as above.
            unsafe { cuda::raw_backward(&rows, &call, workspace, stream) }
        }
        BackendKind::Auto | BackendKind::Cpu => {
            let rows = arrays.host_rows(&shape);
            let needed = Cpu::raw_workspace_size(rows.count(), rows.d_in, call.tokens, num_threads);
            let mut own = Vec::new();
            let workspace = checked_or_own(&args.workspace, &mut own, needed)?;
            // SAFETY: as above.
            unsafe { Cpu::raw_backward(&rows, &call, workspace, num_threads) };
            Ok(())
        }
    }
}

/// Bytes of scratch that the raw calls need; AUTO may turn out to be either device's.
pub fn raw_workspace_size(
    num_latents: usize,
    d_in: usize,
    tokens: usize,
    backend: BackendKind,
    num_threads: usize,
) -> usize {
    let cpu = || Cpu::raw_workspace_size(num_latents, d_in, tokens, num_threads);
    let cuda = || cuda::raw_workspace_size(num_latents, d_in, tokens);
    match backend {
        BackendKind::Reference => 0,
        BackendKind::Cuda => cuda(),
        BackendKind::Cpu => cpu(),
        BackendKind::Auto => cpu().max(cuda()),
    }
}

/// What a raw call is about.
struct RawCall<'a> {
    kind: BackendKind,
    shape: CallShape,
    arrays: RawArrays<'a>,
}

impl<'a> RawCall<'a> {
    fn check(raw: &RawRows<'a>, backend: BackendKind) -> Result<RawCall<'a>> {
        let device = raw.weight.device;
        let kind = resolve_backend(device, backend)?;
        let &[num_latents, d_in] = raw.weight.shape() else {
            bail!(Shape, "weight must be [K, d], not {:?}", raw.weight.shape());
        };
        if num_latents == 0 || d_in == 0 {
            bail!(
                Shape,
                "weight must have at least one row and one column, not {num_latents} x {d_in}"
            );
        }
        let takes_f64 = kind == BackendKind::Reference;
        let shape = CallShape { d_in, num_latents, device, takes_f64 };
        let arrays = RawArrays::check(raw, &shape)?;
        Ok(RawCall { kind, shape, arrays })
    }
}

/// The rows of a raw call on whatever device, checked: arrays of K are contiguous floats.
struct RawArrays<'a> {
    weight: Matrix,
    bias: *const f32,
    sign_weight: *const f32,
    scale: Option<*const f32>,
    gate: RawGate,
    borrow: PhantomData<&'a [f32]>,
}

enum RawGate {
    Open,
    Relu,
    Threshold(*const f32),
    Gated(*const f32),
}

impl<'a> RawArrays<'a> {
    fn check(raw: &RawRows<'a>, shape: &CallShape) -> Result<RawArrays<'a>> {
        let count = shape.num_latents;
        let weight = shape.matrix("weight", &raw.weight, count, shape.d_in, &[DType::F32])?;
        let vector = |name, tensor: &Tensor<'_>| -> Result<*const f32> {
            Ok(shape.floats_of(name, tensor, count)?.cast())
        };
        let optional = |name, tensor: &Option<Tensor<'_>>| {
            tensor.as_ref().map(|tensor| vector(name, tensor)).transpose()
        };
        let (threshold, gate_bias) =
            (optional("threshold", &raw.threshold)?, optional("gate_bias", &raw.gate_bias)?);
        let gate = match (raw.kind, threshold, gate_bias) {
            (RawActivation::Preactivation, None, None) => RawGate::Open,
            (RawActivation::Relu, None, None) => RawGate::Relu,
            (RawActivation::JumpRelu, Some(th), None) => RawGate::Threshold(th),
            (RawActivation::Gated, None, Some(bias)) => RawGate::Gated(bias),
            _ => bail!(
                InvalidArgument,
                "jumprelu takes threshold, gated takes gate_bias, and no other activation takes \
                 either"
            ),
        };
        Ok(RawArrays {
            weight,
            bias: vector("bias", &raw.bias)?,
            sign_weight: vector("sign_weight", &raw.sign_weight)?,
            scale: optional("gate_scale", &raw.gate_scale)?,
            gate,
            borrow: PhantomData,
        })
    }

    /// On the CPU: borrowed.
    fn host_rows(&self, shape: &CallShape) -> Rows<'a> {
        // SAFETY: K contiguous, aligned floats in host memory, readable for 'a.
        let vector = |data| unsafe { std::slice::from_raw_parts(data, shape.num_latents) };
        let reach = (shape.num_latents - 1) * self.weight.row_stride + shape.d_in;
        Rows {
            d_in: shape.d_in,
            // SAFETY: rows of d elements, row_stride apart, aligned, in host memory, readable for
            // 'a.
            weight: unsafe { std::slice::from_raw_parts(self.weight.data.cast::<f32>(), reach) },
            weight_stride: self.weight.row_stride,
            bias: vector(self.bias),
            scale: self.scale.map(vector),
            glu_bias: None,
            gate: match self.gate {
                RawGate::Open => Gate::Open,
                RawGate::Relu => Gate::Relu,
                RawGate::Threshold(values) => Gate::Threshold(vector(values)),
                RawGate::Gated(values) => Gate::Gated(vector(values)),
            },
            sign_weight: vector(self.sign_weight),
            norm: TokenNorm::None,
        }
    }

    /// On CUDA: addresses, which the host never follows.
    fn device_rows(&self, shape: &CallShape) -> Result<RawDeviceRows> {
        let address = |data: *const f32| data.addr() as u64;
        let (gate, gate_values) = match self.gate {
            RawGate::Open => (GateKind::Open, 0),
            RawGate::Relu => (GateKind::Relu, 0),
            RawGate::Threshold(values) => (GateKind::Threshold, address(values)),
            RawGate::Gated(values) => (GateKind::Gated, address(values)),
        };
        let Device::Cuda(device) = shape.device else {
            bail!(Internal, "a CUDA call on {:?}", shape.device);
        };
        let rows = DeviceRows {
            d_in: shape.d_in,
            count: shape.num_latents,
            gate,
            bias: address(self.bias),
            scale: self.scale.map_or(0, address),
            gate_values,
            sign_weight: address(self.sign_weight),
            ..DeviceRows::default()
        };
        Ok(RawDeviceRows { rows, weight: self.weight, device })
    }
}

/// The caller's workspace, or memory of the call's own where there is none.
fn checked_or_own(given: &Scratch<'_>, own: &mut Vec<u8>, needed: usize) -> Result<Workspace> {
    if given.size > 0 {
        return checked_workspace(given, needed);
    }
    let room = needed.saturating_add(WORKSPACE_ALIGN);
    if own.try_reserve_exact(room).is_err() {
        bail!(OutOfMemory, "the call needs a workspace of {needed} bytes, which cannot be had");
    }
    own.resize(room, 0);
    let skip = own.as_ptr().align_offset(WORKSPACE_ALIGN);
    Ok(Scratch::from(&mut own[skip..]).workspace())
}

/// Workspaces must start at a multiple of this.
pub const WORKSPACE_ALIGN: usize = 64;

pub(crate) fn checked_workspace(given: &Scratch<'_>, needed: usize) -> Result<Workspace> {
    if given.size < needed {
        bail!(
            WorkspaceTooSmall,
            "the workspace has {} bytes, the call needs {needed}; ask the workspace_size function",
            given.size
        );
    }
    if needed > 0 && !given.data.addr().is_multiple_of(WORKSPACE_ALIGN) {
        bail!(Layout, "the workspace must start at a multiple of {WORKSPACE_ALIGN} bytes");
    }
    Ok(given.workspace())
}

/// Dtypes of masks.
const MASKS: [DType; 3] = [DType::U8, DType::Bool, DType::F32];

/// What every view of a call is compared with.
pub(crate) struct CallShape {
    pub d_in: usize,
    pub num_latents: usize,
    pub device: Device,
    pub takes_f64: bool,
}

impl CallShape {
    /// The workspace of a raw CUDA call.
    fn raw_workspace(&self, given: &Scratch<'_>, tokens: usize) -> Result<Workspace> {
        checked_workspace(given, cuda::raw_workspace_size(self.num_latents, self.d_in, tokens))
    }

    fn encode_call(&self, args: &EncodeArgs<'_>) -> Result<EncodeCall> {
        let (tokens, hidden) = self.hidden("hidden", &args.hidden)?;
        let out = args.latents.view();
        let latents = self.matrix("latents", out, tokens, self.num_latents, self.values())?;
        check_rows_apart("latents", out)?;
        check_apart("latents", out, "hidden", &args.hidden)?;
        let workspace = args.workspace.view()?;
        check_apart("workspace", &workspace, "latents", out)?;
        check_apart("workspace", &workspace, "hidden", &args.hidden)?;
        Ok(EncodeCall { tokens, hidden, latents, workspace: Workspace::NONE })
    }

    fn penalty_call(
        &self,
        args: &PenaltyArgs<'_>,
        with_grad: bool,
        rows: &[NamedTensor<'_>],
    ) -> Result<PenaltyCall> {
        let (tokens, hidden) = self.hidden("hidden", required("hidden", &args.hidden)?)?;
        let reference = required("reference", &args.reference)?;
        let reference =
            self.matrix("reference", reference, tokens, self.num_latents, self.values())?;
        let mask = match &args.mask {
            Some(mask) => Some(self.mask(mask, tokens)?),
            None => None,
        };
        let coef = match &args.coef {
            Some(coef) => Some(self.coef(coef, tokens)?),
            None => None,
        };
        let grad =
            if with_grad { Some(self.grad(args, tokens, Some(hidden.dtype))?) } else { None };
        check_overlaps(args, with_grad, rows)?;
        Ok(PenaltyCall {
            tokens,
            hidden,
            reference,
            mask,
            coef,
            loss_sum: self.output("loss_sum", &args.loss_sum, 1)?,
            token_count: self.output("token_count", &args.token_count, 1)?,
            latent_loss: self.output("latent_loss", &args.latent_loss, self.num_latents)?,
            grad,
            workspace: Workspace::NONE,
        })
    }

    fn backward_call(
        &self,
        args: &PenaltyArgs<'_>,
        rows: &[NamedTensor<'_>],
    ) -> Result<BackwardCall> {
        let coef = required("coef", &args.coef)?;
        let tokens = coef.view().shape().first().copied().unwrap_or(0);
        let hidden = args.hidden.as_ref();
        let hidden = hidden.map(|hidden| self.hidden("hidden", hidden)).transpose()?;
        if hidden.is_some_and(|(rows, _)| rows != tokens) {
            bail!(Shape, "hidden and coef must have the same number of tokens");
        }
        let coef = self.coef(coef, tokens)?;
        let grad = self.grad(args, tokens, hidden.map(|(_, hidden)| hidden.dtype))?;
        check_overlaps(args, true, rows)?;
        let hidden = hidden.map(|(_, hidden)| hidden);
        Ok(BackwardCall { tokens, coef, grad, hidden, workspace: Workspace::NONE })
    }

    pub fn hidden(&self, name: &str, tensor: &Tensor<'_>) -> Result<(usize, Matrix)> {
        let tokens = tensor.shape().first().copied().unwrap_or(0);
        Ok((tokens, self.matrix(name, tensor, tokens, self.d_in, self.reals())?))
    }

    fn coef(&self, tensor: &TensorMut<'_>, tokens: usize) -> Result<Matrix> {
        check_rows_apart("coef", tensor.view())?;
        self.matrix("coef", tensor.view(), tokens, self.num_latents, self.values())
    }

    fn grad(&self, args: &PenaltyArgs<'_>, tokens: usize, hidden: Option<DType>) -> Result<Grad> {
        let tensor = required("grad_hidden", &args.grad_hidden)?.view();
        let rows = self.matrix("grad_hidden", tensor, tokens, self.d_in, self.reals())?;
        check_rows_apart("grad_hidden", tensor)?;
        if hidden.is_some_and(|hidden| rows.dtype != DType::F32 && rows.dtype != hidden) {
            bail!(
                Dtype,
                "grad_hidden is {}; it must be float32 or hidden's own dtype",
                rows.dtype.name()
            );
        }
        let scale_tensor = match &args.scale_tensor {
            Some(tensor) => Some(self.floats_of("scale_tensor", tensor, 1)?.cast()),
            None => None,
        };
        Ok(Grad { rows, accumulate: args.accumulate, scale: args.scale, scale_tensor })
    }

    pub fn mask(&self, tensor: &Tensor<'_>, tokens: usize) -> Result<Mask> {
        self.vector("mask", tensor, tokens, &MASKS)?;
        Ok(Mask { data: tensor.data, dtype: tensor.dtype, stride: last_stride(tensor) })
    }

    /// The mask of a batch's first row.
    pub fn batch_mask(&self, tensor: &Tensor<'_>, batch: usize, positions: usize) -> Result<Mask> {
        if tensor.shape() != [batch, positions] {
            bail!(Shape, "mask must be [{batch}, {positions}], not {:?}", tensor.shape());
        }
        self.check_memory("mask", tensor, &MASKS)?;
        Ok(Mask { data: tensor.data, dtype: tensor.dtype, stride: last_stride(tensor) })
    }

    fn output(
        &self,
        name: &str,
        out: &Option<TensorMut<'_>>,
        len: usize,
    ) -> Result<Option<Output>> {
        let Some(out) = out else { return Ok(None) };
        let view = out.view();
        self.vector(name, view, len, &[DType::F32, DType::F64])?;
        check_rows_apart(name, view)?;
        Ok(Some(Output { data: out.data_mut(), dtype: view.dtype, stride: last_stride(view) }))
    }

    pub fn floats_of(&self, name: &str, tensor: &Tensor<'_>, len: usize) -> Result<*const u8> {
        self.vector(name, tensor, len, &[DType::F32])?;
        if len > 1 && last_stride(tensor) != 1 {
            bail!(Layout, "{name} must be contiguous");
        }
        Ok(tensor.data)
    }

    pub fn vector(
        &self,
        name: &str,
        tensor: &Tensor<'_>,
        len: usize,
        dtypes: &[DType],
    ) -> Result<()> {
        let scalar = len == 1 && tensor.shape().is_empty();
        if !scalar && tensor.shape() != [len] {
            bail!(Shape, "{name} must be [{len}], not {:?}", tensor.shape());
        }
        self.check_memory(name, tensor, dtypes)
    }

    pub fn matrix(
        &self,
        name: &str,
        tensor: &Tensor<'_>,
        rows: usize,
        cols: usize,
        dtypes: &[DType],
    ) -> Result<Matrix> {
        if tensor.shape() != [rows, cols] {
            bail!(Shape, "{name} must be [{rows}, {cols}], not {:?}", tensor.shape());
        }
        self.check_memory(name, tensor, dtypes)?;
        if cols > 1 && tensor.stride()[1] != 1 {
            bail!(Layout, "the elements of a row of {name} must be adjacent (last stride 1)");
        }
        Ok(Matrix {
            data: tensor.data.cast_mut(),
            dtype: tensor.dtype,
            row_stride: tensor.stride()[0],
        })
    }

    pub fn check_memory(&self, name: &str, tensor: &Tensor<'_>, dtypes: &[DType]) -> Result<()> {
        if !dtypes.contains(&tensor.dtype) {
            let accepted: Vec<&str> = dtypes.iter().map(|d| d.name()).collect();
            bail!(Dtype, "{name} is {}; it must be {}", tensor.dtype.name(), accepted.join(" or "));
        }
        if tensor.device != self.device {
            bail!(
                DeviceMismatch,
                "{name} is on {:?}, the call runs on {:?}",
                tensor.device,
                self.device
            );
        }
        let empty = tensor.shape().contains(&0);
        if tensor.data.is_null() && !empty {
            bail!(NullPointer, "{name} has no data");
        }
        if !(tensor.data as usize).is_multiple_of(tensor.dtype.size()) {
            bail!(Layout, "{name} is not aligned to its {}-byte elements", tensor.dtype.size());
        }
        Ok(())
    }

    /// Dtypes of hidden states and their gradient.
    pub fn reals(&self) -> &'static [DType] {
        let all = &[DType::F32, DType::F16, DType::BF16, DType::F64];
        if self.takes_f64 { all } else { &all[..3] }
    }

    /// Dtypes of [T, K] arrays.
    fn values(&self) -> &'static [DType] {
        let all = &[DType::F32, DType::F64];
        if self.takes_f64 { all } else { &all[..1] }
    }
}

fn required<'b, T>(name: &str, value: &'b Option<T>) -> Result<&'b T> {
    match value {
        Some(value) => Ok(value),
        None => bail!(NullPointer, "{name} is required by this call"),
    }
}

pub(crate) fn last_stride(tensor: &Tensor<'_>) -> usize {
    tensor.stride().last().copied().unwrap_or(1)
}

/// No two elements of an output may share memory.
pub(crate) fn check_rows_apart(name: &str, tensor: &Tensor<'_>) -> Result<()> {
    let row = tensor.shape().get(1).copied().unwrap_or(1);
    let many = tensor.shape().first().is_some_and(|rows| *rows > 1);
    if many && tensor.stride()[0] < row {
        bail!(Layout, "the rows of {name} overlap: its row stride is smaller than a row");
    }
    Ok(())
}

/// Outputs and scratch share memory with nothing; `rows` are further inputs.
fn check_overlaps(args: &PenaltyArgs<'_>, with_grad: bool, rows: &[NamedTensor<'_>]) -> Result<()> {
    fn view<'a>(out: &Option<TensorMut<'a>>) -> Option<Tensor<'a>> {
        out.as_ref().map(|tensor| *tensor.view())
    }
    let outputs = [
        ("coef", view(&args.coef)),
        ("loss_sum", view(&args.loss_sum)),
        ("token_count", view(&args.token_count)),
        ("latent_loss", view(&args.latent_loss)),
        ("grad_hidden", if with_grad { view(&args.grad_hidden) } else { None }),
        ("workspace", Some(args.workspace.view()?)),
    ];
    let inputs = [
        ("hidden", args.hidden),
        ("reference", args.reference),
        ("mask", args.mask),
        ("scale_tensor", args.scale_tensor),
    ];
    check_outputs_apart(&outputs, [&inputs[..], rows])
}

/// Outputs share memory neither with each other nor with inputs.
pub(crate) fn check_outputs_apart(
    outputs: &[NamedTensor<'_>],
    inputs: [&[NamedTensor<'_>]; 2],
) -> Result<()> {
    for (i, (name, out)) in outputs.iter().enumerate() {
        let Some(out) = out else { continue };
        for (other, tensor) in outputs[..i].iter().chain(inputs.into_iter().flatten()) {
            if let Some(tensor) = tensor {
                check_apart(name, out, other, tensor)?;
            }
        }
    }
    Ok(())
}

/// Refuses shared memory; two column ranges of one larger matrix are apart.
fn check_apart(name: &str, a: &Tensor<'_>, other: &str, b: &Tensor<'_>) -> Result<()> {
    let (span_a, span_b) = (a.span(), b.span());
    if span_a.is_empty() || span_b.is_empty() {
        return Ok(());
    }
    let meet = span_a.start < span_b.end && span_b.start < span_a.end;
    if meet && !interleaved(a, b) {
        bail!(Overlap, "{name} shares memory with {other}");
    }
    Ok(())
}

fn interleaved(a: &Tensor<'_>, b: &Tensor<'_>) -> bool {
    let (&[_, cols_a], &[_, cols_b]) = (a.shape(), b.shape()) else { return false };
    let pitch = a.stride()[0] * a.dtype.size();
    if pitch == 0 || pitch != b.stride()[0] * b.dtype.size() {
        return false;
    }
    let (row_a, row_b) = (cols_a * a.dtype.size(), cols_b * b.dtype.size());
    let offset = (b.data as usize as isize - a.data as usize as isize).rem_euclid(pitch as isize);
    offset as usize >= row_a && offset as usize + row_b <= pitch
}
