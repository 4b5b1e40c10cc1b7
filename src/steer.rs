//! Steering: hidden states pushed along decoder directions, a condition in each row of a batch.
//!
//! For row b of a batch with a latent k_b and a strength, and positions s with share m[b,s]:
//!
//! ```text
//! h[b,s,:] += strength_b · scale · m[b,s] · d̂[k_b,:]      d̂_k = D_k / ‖D_k‖, D_k the decoder row
//! norm[t]   = ‖h_t‖
//! ```
//!
//! This is h ← h + α · scale · d̂_k of BLOCK-EM (arXiv 2602.00767, appendix A.3), where scale is the
//! median over tokens of the residual stream's norms at the layer, and α the strength. Folds of the
//! SAE do not matter: they stretch a decoder row, or shift what it is added to, but never turn it.
//! Positions with m = 0, rows without a latent and rows of strength 0 keep their bits.

use sha2::{Digest, Sha256};

use crate::backend::cpu::{self, CpuSteering};
use crate::backend::cuda::{self, CudaSteering};
use crate::backend::reference::{self, ReferenceSteering};
use crate::backend::{Column, Directions, Matrix, Output, SteerBackend, SteerCall, TokenNormsCall};
use crate::error::{Result, bail};
use crate::penalty::{CallShape, NamedTensor, check_outputs_apart, check_rows_apart, last_stride};
use crate::plan::{BackendKind, Part, PlanOptions, cuda_index, resolve_backend};
use crate::sae::Sae;
use crate::tensor::{DType, Device, Stream, Tensor, TensorMut};

/// Decoder directions of some latents on a device. Never changes after creation: any thread may use
/// it.
pub struct Steering {
    backend: Box<dyn SteerBackend>,
    kind: BackendKind,
    device: Device,
    d_in: usize,
    ids: Vec<u64>,
    layer: Option<i64>,
    identity: String,
}

/// Arguments of [`Steering::steer`].
#[derive(Debug)]
pub struct SteerArgs<'a> {
    /// [B, S, d] F32, F16 or BF16, changed in place.
    pub hidden: TensorMut<'a>,
    /// [B] I64: which of the steering's latents, from 0; -1 leaves the row as it is.
    pub row: Tensor<'a>,
    /// [B] F32
    pub strength: Tensor<'a>,
    /// [B, S] U8, Bool or F32; absent means 1 for each position.
    pub mask: Option<Tensor<'a>>,
    /// Multiplies every strength.
    pub scale: f64,
    /// [1] F32: multiplies them too, read when the work runs.
    pub scale_tensor: Option<Tensor<'a>>,
}

impl<'a> SteerArgs<'a> {
    /// Every position, at a scale of 1.
    pub fn new(hidden: TensorMut<'a>, row: Tensor<'a>, strength: Tensor<'a>) -> SteerArgs<'a> {
        SteerArgs { hidden, row, strength, mask: None, scale: 1.0, scale_tensor: None }
    }
}

impl Steering {
    /// Reads the decoder rows of the latents. Of the options device, backend and num_threads count.
    pub fn new(sae: &Sae, ids: &[i64], options: &PlanOptions) -> Result<Steering> {
        let kind = resolve_backend(options.device, options.backend)?;
        if options.part != Part::Whole {
            bail!(Unsupported, "steering takes whole hidden states, not a part of a plan");
        }
        let (ids, d_in) = (latent_ids(ids)?, sae.recipe().d_in);
        let Some(rows) = sae.decoder_directions(&ids)? else {
            bail!(
                TensorMissing,
                "this SAE has no decoder, and steering adds decoder rows: open the file or folder \
                 that holds it, or give decoder_weight with the tensors"
            );
        };
        let identity = identity(&ids, d_in, &rows);
        let directions = Directions { d_in, rows };
        let backend: Box<dyn SteerBackend> = match kind {
            BackendKind::Reference => Box::new(ReferenceSteering(directions)),
            BackendKind::Cuda => {
                Box::new(CudaSteering::new(&directions, cuda_index(options.device))?)
            }
            BackendKind::Auto | BackendKind::Cpu => {
                Box::new(CpuSteering::new(&directions, options.num_threads))
            }
        };
        let (device, layer) = (options.device, sae.recipe().layer);
        Ok(Steering { backend, kind, device, d_in, ids, layer, identity })
    }

    /// Pushes the hidden states of a batch.
    pub fn steer(&self, args: &mut SteerArgs<'_>) -> Result<()> {
        self.steer_on(Stream::NULL, args)
    }

    /// [`Steering::steer`] on a CUDA stream: it returns when the work is on the stream, and every
    /// tensor must live until it is done. A row out of range is not seen before: the device writes
    /// NaN there.
    pub fn steer_on(&self, stream: Stream, args: &mut SteerArgs<'_>) -> Result<()> {
        let call = self.call(args)?;
        if self.device == Device::Cpu {
            self.check_rows(&call)?;
        }
        // SAFETY: `call` checked every view, and on the CPU all rows are in range.
        unsafe { self.backend.steer(&call, stream) }
    }

    /// Columns of hidden.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// Ids in the dictionary, in the order that the rows of a call count.
    pub fn latent_ids(&self) -> &[u64] {
        &self.ids
    }

    pub fn layer(&self) -> Option<i64> {
        self.layer
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn backend(&self) -> BackendKind {
        self.kind
    }

    /// Worker threads of a run call.
    pub fn num_threads(&self) -> usize {
        self.backend.num_threads()
    }

    /// sha256 of ids and directions.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    fn call(&self, args: &SteerArgs<'_>) -> Result<SteerCall> {
        let shape = CallShape {
            d_in: self.d_in,
            num_latents: self.ids.len(),
            device: self.device,
            takes_f64: self.backend.takes_f64(),
        };
        if !args.scale.is_finite() {
            bail!(InvalidArgument, "scale is {}; it must be finite", args.scale);
        }
        let view = args.hidden.view();
        let (batch, positions) = self.batch_of(view)?;
        shape.check_memory("hidden", view, shape.reals())?;
        let &[hidden_stride, row_stride, column_stride] = view.stride() else {
            bail!(Internal, "hidden has three dimensions");
        };
        if self.d_in > 1 && column_stride != 1 {
            bail!(Layout, "the elements of a row of hidden must be adjacent (last stride 1)");
        }
        if !are_apart(view, self.d_in) {
            bail!(Layout, "positions of hidden share memory: {:?}", view.stride());
        }
        shape.vector("row", &args.row, batch, &[DType::I64])?;
        shape.vector("strength", &args.strength, batch, &[DType::F32])?;
        let mask = args.mask.as_ref();
        let mask = mask.map(|mask| shape.batch_mask(mask, batch, positions)).transpose()?;
        let scale_tensor = args.scale_tensor.as_ref();
        let scale_tensor =
            scale_tensor.map(|tensor| shape.floats_of("scale_tensor", tensor, 1)).transpose()?;
        let inputs: [NamedTensor<'_>; 4] = [
            ("row", Some(args.row)),
            ("strength", Some(args.strength)),
            ("mask", args.mask),
            ("scale_tensor", args.scale_tensor),
        ];
        check_outputs_apart(&[("hidden", Some(*view))], [&inputs, &[]])?;
        Ok(SteerCall {
            batch,
            positions,
            hidden: Matrix { data: args.hidden.data_mut(), dtype: view.dtype, row_stride },
            hidden_stride,
            row: Column { data: args.row.data.cast(), stride: last_stride(&args.row) },
            strength: Column {
                data: args.strength.data.cast(),
                stride: last_stride(&args.strength),
            },
            mask,
            mask_stride: args.mask.map_or(0, |mask| mask.stride()[0]),
            scale: args.scale,
            scale_tensor: scale_tensor.map(|data| data.cast()),
        })
    }

    /// B and S.
    fn batch_of(&self, hidden: &Tensor<'_>) -> Result<(usize, usize)> {
        match hidden.shape() {
            &[batch, positions, columns] if columns == self.d_in => Ok((batch, positions)),
            other => bail!(Shape, "hidden must be [B, S, {}], not {other:?}", self.d_in),
        }
    }

    fn check_rows(&self, call: &SteerCall) -> Result<()> {
        for b in 0..call.batch {
            // SAFETY: the view has B elements in host memory.
            let row = unsafe { call.row.get(b) };
            if row < -1 || row >= self.ids.len() as i64 {
                bail!(
                    LatentRange,
                    "row[{b}] is {row}, but the steering has {} latents; -1 leaves a row as it is",
                    self.ids.len()
                );
            }
        }
        Ok(())
    }
}

/// Arguments of [`token_norms`].
#[derive(Debug)]
pub struct TokenNormsArgs<'a> {
    /// [T, d] F32, F16 or BF16.
    pub hidden: Tensor<'a>,
    /// [T] F32 or F64, written.
    pub norms: TensorMut<'a>,
}

/// ‖h_t‖ of every token, summed in f64. On CUDA the first call in a context loads the kernels.
pub fn token_norms(
    args: &mut TokenNormsArgs<'_>,
    backend: BackendKind,
    num_threads: usize,
    stream: Stream,
) -> Result<()> {
    let device = args.hidden.device;
    let kind = resolve_backend(device, backend)?;
    let &[tokens, d_in] = args.hidden.shape() else {
        bail!(Shape, "hidden must be [T, d], not {:?}", args.hidden.shape());
    };
    if d_in == 0 {
        bail!(Shape, "hidden must have at least one column");
    }
    let takes_f64 = kind == BackendKind::Reference;
    let shape = CallShape { d_in, num_latents: 0, device, takes_f64 };
    let (_, hidden) = shape.hidden("hidden", &args.hidden)?;
    let view = args.norms.view();
    shape.vector("norms", view, tokens, &[DType::F32, DType::F64])?;
    check_rows_apart("norms", view)?;
    check_outputs_apart(&[("norms", Some(*view))], [&[("hidden", Some(args.hidden))], &[]])?;
    let norms =
        Output { data: args.norms.data_mut(), dtype: view.dtype, stride: last_stride(view) };
    let call = TokenNormsCall { tokens, d_in, hidden, norms };
    // SAFETY: every view was checked.
    unsafe {
        match kind {
            BackendKind::Reference => reference::token_norms(&call),
            BackendKind::Cuda => return cuda::token_norms(&call, cuda_index(device), stream),
            BackendKind::Auto | BackendKind::Cpu => cpu::token_norms(&call, num_threads),
        }
    }
    Ok(())
}

fn latent_ids(ids: &[i64]) -> Result<Vec<u64>> {
    if ids.is_empty() {
        bail!(InvalidArgument, "there are no latents to steer along; name at least one");
    }
    let id = |id: &i64| match u64::try_from(*id) {
        Ok(id) => Ok(id),
        Err(_) => bail!(LatentRange, "latent {id} does not exist"),
    };
    ids.iter().map(id).collect()
}

/// Whether no two positions [B, S] of `columns` adjacent elements meet: either dimension may be the
/// outer one.
fn are_apart(hidden: &Tensor<'_>, columns: usize) -> bool {
    let (shape, stride) = (hidden.shape(), hidden.stride());
    if shape.contains(&0) {
        return true;
    }
    let nested = |outer: usize, inner: usize| {
        let reach = (shape[inner] - 1) * stride[inner] + columns;
        (shape[inner] == 1 || stride[inner] >= columns)
            && (shape[outer] == 1 || stride[outer] >= reach)
    };
    nested(0, 1) || nested(1, 0)
}

fn identity(ids: &[u64], d_in: usize, rows: &[f32]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"blockem steering 1\n");
    hash.update((d_in as u64).to_le_bytes());
    ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    rows.iter().for_each(|x| hash.update(x.to_le_bytes()));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
