//! libblockem for C++ that is built from source with cargo: Rust's own types through a cxx bridge,
//! errors as `rust::Error`. Programs that link an installed library take `blockem.hpp` instead, and
//! so do those that compute on a GPU: slices are host memory.
//!
//! A matrix is a slice of bytes with a dtype, row-major without gaps; its rows follow from its size.

use std::fmt;

use blockem::penalty::{EncodeArgs, PenaltyArgs, Scratch, WORKSPACE_ALIGN};
use blockem::plan::PlanOptions;
use blockem::sae::SaeOptions;
use blockem::tensor::{DType, Device, Tensor, TensorMut};

#[cxx::bridge(namespace = "blockem::bridge")]
mod ffi {
    /// Element types of hidden states and their gradient.
    enum Dtype {
        F32,
        F16,
        BF16,
    }

    /// From pre-activation to latent.
    enum Activation {
        /// The rule of the SAE's file.
        Native,
        /// relu, no threshold, no top-k: what BLOCK-EM's authors use.
        DenseRelu,
        /// No gate.
        Preactivation,
    }

    /// sum_t m_t sum_k w_k relu(s_k (z - zref))^2 and sum_t m_t: add them up over micro-batches and
    /// ranks, then divide once.
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Loss {
        sum: f64,
        count: f64,
    }

    /// What a penalty call reads.
    struct Batch<'a> {
        /// [T, d]
        hidden: &'a [u8],
        dtype: Dtype,
        /// [T, K]: z of the base model's hidden states.
        reference: &'a [f32],
        /// [T] m_t; empty means 1 for each token.
        mask: &'a [f32],
    }

    extern "Rust" {
        type Sae;
        type Latents;
        type Plan;

        /// A SAELens folder, or a safetensors file that states its recipe.
        fn open_sae(path: &str) -> Result<Box<Sae>>;
        /// The resolved recipe as JSON.
        fn describe(self: &Sae) -> Result<String>;
        fn d_in(self: &Sae) -> usize;
        fn d_sae(self: &Sae) -> usize;

        /// K0.json.
        fn open_latents(path: &str, sae: &Sae) -> Result<Box<Latents>>;
        /// signs are +1 (blocked from rising) or -1; empty weights mean 1 for each latent.
        fn make_latents(ids: &[i64], signs: &[i8], weights: &[f32]) -> Result<Box<Latents>>;

        /// num_threads 0 means one for each core. The plan outlives both of the others.
        fn make_plan(
            sae: &Sae,
            latents: &Latents,
            activation: Activation,
            num_threads: usize,
        ) -> Result<Box<Plan>>;
        fn d_in(self: &Plan) -> usize;
        /// K
        fn num_latents(self: &Plan) -> usize;
        /// Names the arithmetic: equal names give equal z, bit for bit.
        fn numerics(self: &Plan) -> String;

        /// z [T, K] of hidden [T, d].
        fn encode(self: &Plan, hidden: &[u8], dtype: Dtype, latents: &mut [f32]) -> Result<()>;
        /// The loss, and coef [T, K] for backward.
        fn forward(self: &Plan, batch: &Batch, coef: &mut [f32]) -> Result<Loss>;
        /// grad [T, d] (+)= scale sum_k coef[t,k] W_k; grad_dtype is F32 or that of hidden.
        fn backward(
            self: &Plan,
            coef: &mut [f32],
            grad: &mut [u8],
            grad_dtype: Dtype,
            scale: f64,
            accumulate: bool,
        ) -> Result<()>;
        /// forward and backward in one pass over hidden.
        fn penalty(
            self: &Plan,
            batch: &Batch,
            grad: &mut [u8],
            grad_dtype: Dtype,
            scale: f64,
            accumulate: bool,
        ) -> Result<Loss>;
    }
}

use ffi::{Activation, Batch, Dtype, Loss};

struct Sae(blockem::sae::Sae);
struct Latents(blockem::latents::Latents);
struct Plan(blockem::plan::Plan);

/// What an exception says: the status by name, then the library's message.
#[derive(Debug)]
struct Error(blockem::error::Error);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.status.name(), self.0.message)
    }
}

impl From<blockem::error::Error> for Error {
    fn from(error: blockem::error::Error) -> Error {
        Error(error)
    }
}

type Result<T> = std::result::Result<T, Error>;

fn refuse<T>(message: String) -> Result<T> {
    Err(Error(blockem::error::Error::new(blockem::error::Status::InvalidArgument, message)))
}

fn open_sae(path: &str) -> Result<Box<Sae>> {
    Ok(Box::new(Sae(blockem::sae::Sae::open(path, &SaeOptions::default())?)))
}

impl Sae {
    fn describe(&self) -> Result<String> {
        Ok(self.0.describe()?.to_string())
    }

    fn d_in(&self) -> usize {
        self.0.recipe().d_in
    }

    fn d_sae(&self) -> usize {
        self.0.recipe().d_sae
    }
}

fn open_latents(path: &str, sae: &Sae) -> Result<Box<Latents>> {
    Ok(Box::new(Latents(blockem::latents::Latents::open(path, &sae.0)?)))
}

fn make_latents(ids: &[i64], signs: &[i8], weights: &[f32]) -> Result<Box<Latents>> {
    let weights = (!weights.is_empty()).then_some(weights);
    Ok(Box::new(Latents(blockem::latents::Latents::new(ids, signs, weights)?)))
}

fn make_plan(
    sae: &Sae,
    latents: &Latents,
    activation: Activation,
    num_threads: usize,
) -> Result<Box<Plan>> {
    use blockem::plan::Activation as Rule;
    let activation = match activation {
        Activation::Native => Rule::Native,
        Activation::DenseRelu => Rule::DenseRelu,
        Activation::Preactivation => Rule::Preactivation,
        other => return refuse(format!("there is no activation {}", other.repr)),
    };
    let options = PlanOptions { activation, num_threads, ..PlanOptions::default() };
    Ok(Box::new(Plan(blockem::plan::Plan::new(&sae.0, &latents.0, &options)?)))
}

impl Plan {
    fn d_in(&self) -> usize {
        self.0.d_in()
    }

    fn num_latents(&self) -> usize {
        self.0.num_latents()
    }

    fn numerics(&self) -> String {
        self.0.numerics()
    }

    fn encode(&self, hidden: &[u8], dtype: Dtype, latents: &mut [f32]) -> Result<()> {
        let hidden = matrix(hidden, dtype, self.d_in())?;
        let shape = [rows(latents.len(), self.num_latents()), self.num_latents()];
        let latents = TensorMut::from_slice(latents, &shape)?;
        let mut space = Vec::new();
        let workspace = match self.0.encode_needs_workspace() {
            true => self.workspace(&mut space, shape[0]),
            false => Scratch::NONE,
        };
        Ok(self.0.encode(&mut EncodeArgs { hidden, latents, workspace })?)
    }

    fn forward(&self, batch: &Batch<'_>, coef: &mut [f32]) -> Result<Loss> {
        let shape = [rows(coef.len(), self.num_latents()), self.num_latents()];
        let coef = Some(TensorMut::from_slice(coef, &shape)?);
        self.run(batch, |plan, args| plan.forward(&mut PenaltyArgs { coef, ..args }))
    }

    fn backward(
        &self,
        coef: &mut [f32],
        grad: &mut [u8],
        grad_dtype: Dtype,
        scale: f64,
        accumulate: bool,
    ) -> Result<()> {
        let shape = [rows(coef.len(), self.num_latents()), self.num_latents()];
        Ok(self.0.backward(&mut PenaltyArgs {
            coef: Some(TensorMut::from_slice(coef, &shape)?),
            grad_hidden: Some(matrix_mut(grad, grad_dtype, self.d_in())?),
            scale,
            accumulate,
            ..PenaltyArgs::default()
        })?)
    }

    fn penalty(
        &self,
        batch: &Batch<'_>,
        grad: &mut [u8],
        grad_dtype: Dtype,
        scale: f64,
        accumulate: bool,
    ) -> Result<Loss> {
        let grad_hidden = Some(matrix_mut(grad, grad_dtype, self.d_in())?);
        self.run(batch, |plan, args| {
            plan.penalty(&mut PenaltyArgs { grad_hidden, scale, accumulate, ..args })
        })
    }

    fn run(
        &self,
        batch: &Batch<'_>,
        work: impl FnOnce(&blockem::plan::Plan, PenaltyArgs<'_>) -> blockem::error::Result<()>,
    ) -> Result<Loss> {
        let hidden = matrix(batch.hidden, batch.dtype, self.d_in())?;
        let tokens = hidden.shape()[0];
        let shape = [rows(batch.reference.len(), self.num_latents()), self.num_latents()];
        let mask = (!batch.mask.is_empty())
            .then(|| Tensor::from_slice(batch.mask, &[batch.mask.len()]))
            .transpose()?;
        let (mut sum, mut count) = ([0.0f64], [0.0f64]);
        let mut space = Vec::new();
        let args = PenaltyArgs {
            hidden: Some(hidden),
            reference: Some(Tensor::from_slice(batch.reference, &shape)?),
            mask,
            loss_sum: Some(TensorMut::from_slice(&mut sum, &[1])?),
            token_count: Some(TensorMut::from_slice(&mut count, &[1])?),
            workspace: self.workspace(&mut space, tokens),
            ..PenaltyArgs::default()
        };
        work(&self.0, args)?;
        Ok(Loss { sum: sum[0], count: count[0] })
    }

    fn workspace<'a>(&self, space: &'a mut Vec<u8>, tokens: usize) -> Scratch<'a> {
        space.resize(self.0.workspace_size(tokens) + WORKSPACE_ALIGN, 0);
        let skip = space.as_ptr().align_offset(WORKSPACE_ALIGN);
        (&mut space[skip..]).into()
    }
}

/// Whole rows in a slice; what is over shows as a shape error of the call.
fn rows(len: usize, columns: usize) -> usize {
    len.div_ceil(columns)
}

fn dtype(dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::F16 => Ok(DType::F16),
        Dtype::BF16 => Ok(DType::BF16),
        other => refuse(format!("there is no dtype {}", other.repr)),
    }
}

fn matrix(bytes: &[u8], of: Dtype, columns: usize) -> Result<Tensor<'_>> {
    let (of, shape) = (dtype(of)?, matrix_shape(bytes.len(), dtype(of)?, columns)?);
    // SAFETY: the slice holds every element of the row-major shape for its lifetime.
    Ok(unsafe { Tensor::from_raw(bytes.as_ptr(), of, Device::Cpu, &shape, &[columns, 1])? })
}

fn matrix_mut(bytes: &mut [u8], of: Dtype, columns: usize) -> Result<TensorMut<'_>> {
    let (of, shape) = (dtype(of)?, matrix_shape(bytes.len(), dtype(of)?, columns)?);
    let data = bytes.as_mut_ptr();
    // SAFETY: as above, and the borrow is unique.
    Ok(unsafe { TensorMut::from_raw(data, of, Device::Cpu, &shape, &[columns, 1])? })
}

fn matrix_shape(bytes: usize, of: DType, columns: usize) -> Result<[usize; 2]> {
    let row = columns * of.size();
    if !bytes.is_multiple_of(row) {
        return refuse(format!("{bytes} bytes are no whole rows of {columns} {}", of.name()));
    }
    Ok([bytes / row, columns])
}
