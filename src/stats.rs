//! Statistics of a whole dictionary: sums over tokens for every latent, without z of all of them.
//!
//! For tokens t with share m_t ≠ 0, latents z of a model and z' of the base model:
//!
//! ```text
//! SUM[k]        = Σ_t m_t z[t,k]                 BASE_SUM, ...: the same of z'
//! SQUARE_SUM[k] = Σ_t m_t z[t,k]²
//! ACTIVE[k]     = Σ_t m_t [z[t,k] ≠ 0]
//! MAX[k]        = max_t z[t,k], −∞ without a token
//! RISE_SQUARE_SUM[k] = Σ_t m_t relu(z[t,k] − z'[t,k])²     the penalty of latent k in K+
//! FALL_SQUARE_SUM[k] = Σ_t m_t relu(z'[t,k] − z[t,k])²     and in K-
//! token_count   = Σ_t m_t
//! ```
//!
//! Two states of the same dictionary merge: their maxima to the larger one, all else to the sum. With
//! shares of 1 / (tokens of the prompt) the sums are those of each prompt's mean: divided by the
//! number of prompts they are what Stage 1 of BLOCK-EM compares. A NaN reaches the sums and the
//! maximum; a token with m_t = 0 contributes nothing, even if its hidden states are NaN.

use std::cell::RefCell;
use std::ops::Range;

use crate::backend::cpu::CpuStats;
use crate::backend::cuda::CudaStats;
use crate::backend::reference::ReferenceStats;
use crate::backend::{OwnedRows, StatsBackend, StatsCall, Workspace};
use crate::dictionary::expect_whole;
use crate::error::{Result, bail};
use crate::penalty::{
    CallShape, NamedTensor, Scratch, check_outputs_apart, check_rows_apart, checked_workspace,
};
use crate::plan::{
    Activation, BackendKind, Columns, Contest, Part, PlanOptions, cuda_index, gated_rows,
    resolve_backend,
};
use crate::sae::{Architecture, Sae};
use crate::tensor::{DType, Device, Stream, Tensor, TensorMut};

/// Rows of a state.
pub mod rows {
    pub const SUM: usize = 0;
    pub const SQUARE_SUM: usize = 1;
    pub const ACTIVE: usize = 2;
    pub const MAX: usize = 3;
    pub const BASE_SUM: usize = 4;
    pub const BASE_SQUARE_SUM: usize = 5;
    pub const BASE_ACTIVE: usize = 6;
    pub const BASE_MAX: usize = 7;
    pub const RISE_SQUARE_SUM: usize = 8;
    pub const FALL_SQUARE_SUM: usize = 9;
    /// How many a state has, of one model and of two.
    pub const ALONE: usize = 4;
    pub const WITH_BASE: usize = 10;
}

/// All latents of an SAE on a device. Never changes after creation: any thread may use it. The sums
/// are the caller's.
pub struct Stats {
    backend: Box<dyn StatsBackend>,
    kind: BackendKind,
    device: Device,
    activation: Activation,
    d_in: usize,
    d_sae: usize,
    layer: Option<i64>,
    identity: String,
}

/// Arguments of [`Stats::update`].
#[derive(Debug)]
pub struct StatsArgs<'a> {
    /// [T, d] F32, F16 or BF16.
    pub hidden: Tensor<'a>,
    /// [T, d] in any of these: the base model's, of the same tokens.
    pub base_hidden: Option<Tensor<'a>>,
    /// [T] U8, Bool or F32; absent means that every token counts once.
    pub mask: Option<Tensor<'a>>,
    /// [[`rows::ALONE`], F] F64, or with base_hidden [[`rows::WITH_BASE`], F].
    pub state: TensorMut<'a>,
    /// [1] F64.
    pub token_count: Option<TensorMut<'a>>,
    /// Add to state and token_count instead of overwriting them.
    pub accumulate: bool,
    /// At least [`Stats::workspace_size`] bytes.
    pub workspace: Scratch<'a>,
}

impl<'a> StatsArgs<'a> {
    /// Of one model, overwriting, all tokens, without a workspace.
    pub fn new(hidden: Tensor<'a>, state: TensorMut<'a>) -> StatsArgs<'a> {
        StatsArgs {
            hidden,
            base_hidden: None,
            mask: None,
            state,
            token_count: None,
            accumulate: false,
            workspace: Scratch::NONE,
        }
    }
}

impl Stats {
    /// Reads every row of the SAE once, and keeps them all.
    pub fn new(sae: &Sae, options: &PlanOptions) -> Result<Stats> {
        let kind = resolve_backend(options.device, options.backend)?;
        expect_whole(sae)?;
        let recipe = sae.recipe();
        if options.part != Part::Whole {
            bail!(Unsupported, "statistics are of whole latents, not of a part of a plan");
        }
        let (d_in, d_sae) = (recipe.d_in, recipe.d_sae);
        let reader = Reader::new(sae, options.activation)?;
        let read = |range| reader.read(range);
        let backend: Box<dyn StatsBackend> = match kind {
            BackendKind::Reference => Box::new(ReferenceStats::new(d_sae, &read)?),
            BackendKind::Cuda => {
                Box::new(CudaStats::new(d_sae, &read, cuda_index(options.device))?)
            }
            BackendKind::Auto | BackendKind::Cpu => {
                Box::new(CpuStats::new(d_in, d_sae, &read, options.num_threads)?)
            }
        };
        Ok(Stats {
            backend,
            kind,
            device: options.device,
            activation: options.activation,
            d_in,
            d_sae,
            layer: recipe.layer,
            identity: reader.identity(),
        })
    }

    /// Sums of more tokens.
    pub fn update(&self, args: &mut StatsArgs<'_>) -> Result<()> {
        self.update_on(Stream::NULL, args)
    }

    /// [`Stats::update`] on a CUDA stream: it returns when the work is on the stream, and every
    /// tensor must live until it is done.
    pub fn update_on(&self, stream: Stream, args: &mut StatsArgs<'_>) -> Result<()> {
        let call = self.call(args)?;
        let needed = self.workspace_size(call.tokens, call.base_hidden.is_some());
        let workspace = checked_workspace(&args.workspace, needed)?;
        // SAFETY: `call` checked every view against the dictionary.
        unsafe { self.backend.update(&StatsCall { workspace, ..call }, stream) }
    }

    /// Bytes of scratch that a call needs for so many tokens.
    pub fn workspace_size(&self, tokens: usize, has_base: bool) -> usize {
        self.backend.workspace_size(tokens, has_base)
    }

    pub fn d_in(&self) -> usize {
        self.d_in
    }

    pub fn d_sae(&self) -> usize {
        self.d_sae
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

    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Worker threads of a run call.
    pub fn num_threads(&self) -> usize {
        self.backend.num_threads()
    }

    /// That of a plan of all latents in the dictionary's order: states with one identity merge.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Names the arithmetic of z, as a plan's does.
    pub fn numerics(&self) -> String {
        self.backend.numerics()
    }

    fn call(&self, args: &StatsArgs<'_>) -> Result<StatsCall> {
        let shape = CallShape {
            d_in: self.d_in,
            num_latents: self.d_sae,
            device: self.device,
            takes_f64: self.backend.takes_f64(),
        };
        let (tokens, hidden) = shape.hidden("hidden", &args.hidden)?;
        let base = args.base_hidden.as_ref();
        let base_hidden = base.map(|base| shape.hidden("base_hidden", base)).transpose()?;
        if base_hidden.is_some_and(|(rows, _)| rows != tokens) {
            bail!(Shape, "hidden and base_hidden must have the same number of tokens");
        }
        let mask = args.mask.as_ref().map(|mask| shape.mask(mask, tokens)).transpose()?;
        let rows = if base.is_some() { rows::WITH_BASE } else { rows::ALONE };
        let view = args.state.view();
        let state = shape.matrix("state", view, rows, self.d_sae, &[DType::F64])?;
        check_rows_apart("state", view)?;
        let count = args.token_count.as_ref().map(TensorMut::view);
        if let Some(count) = count {
            shape.vector("token_count", count, 1, &[DType::F64])?;
        }
        let inputs: [NamedTensor<'_>; 3] =
            [("hidden", Some(args.hidden)), ("base_hidden", args.base_hidden), ("mask", args.mask)];
        let outputs: [NamedTensor<'_>; 3] = [
            ("state", Some(*view)),
            ("token_count", count.copied()),
            ("workspace", Some(args.workspace.view()?)),
        ];
        check_outputs_apart(&outputs, [&inputs, &[]])?;
        Ok(StatsCall {
            tokens,
            hidden,
            base_hidden: base_hidden.map(|(_, base)| base),
            mask,
            state,
            token_count: args.token_count.as_ref().map(|count| count.data_mut().cast()),
            accumulate: args.accumulate,
            workspace: Workspace::NONE,
        })
    }
}

/// Rows of the dictionary for a backend, and what they are known by.
struct Reader<'a> {
    sae: &'a Sae,
    activation: Activation,
    contest: Option<Contest<'a>>,
    columns: RefCell<Columns>,
}

impl Reader<'_> {
    fn new(sae: &Sae, activation: Activation) -> Result<Reader<'_>> {
        let contest = match (sae.recipe().architecture, activation) {
            (Architecture::TopK, Activation::Native) => {
                let all: Vec<u64> = (0..sae.recipe().d_sae as u64).collect();
                Some(Contest::new(sae, &all)?)
            }
            _ => None,
        };
        let columns = RefCell::new(Columns::none(sae, activation));
        Ok(Reader { sae, activation, contest, columns })
    }

    /// Each range once, in order.
    fn read(&self, range: Range<usize>) -> Result<OwnedRows> {
        let ids: Vec<u64> = range.clone().map(|id| id as u64).collect();
        let rows = self.sae.gather(&ids)?;
        self.columns.borrow_mut().add(&ids, &rows);
        if let Some(contest) = &self.contest {
            contest.seen(&rows);
        }
        let gate = self.contest.as_ref().map(|contest| contest.gate.part(range));
        Ok(gated_rows(rows, self.sae.recipe(), self.activation, gate))
    }

    fn identity(self) -> String {
        let mut columns = self.columns.into_inner();
        if let Some(contest) = self.contest {
            columns.compete(contest);
        }
        columns.identity(0..columns.ids.len())
    }
}
