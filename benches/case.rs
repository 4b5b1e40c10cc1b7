//! One problem: a plan, and memory for everything that a call reads or writes.

use blockem::latents::Latents;
use blockem::penalty::{EncodeArgs, PenaltyArgs, WORKSPACE_ALIGN};
use blockem::plan::{Plan, PlanOptions};
use blockem::sae::{Architecture, Sae, SaeTensors};
use blockem::tensor::{Element, Tensor, TensorMut};
use half::bf16;

pub const TOKENS: usize = 4096;
pub const D_IN: usize = 4096;
pub const COUNTS: [usize; 2] = [20, 256];

/// hidden and dH are H; the reference comes from hidden states of an independent draw, so that
/// about a quarter of the pairs violate.
pub struct Case<H> {
    pub name: String,
    plan: Plan,
    hidden: Vec<H>,
    reference: Vec<f32>,
    coef: Vec<f32>,
    grad: Vec<H>,
    loss_sum: [f64; 1],
    workspace: Vec<u8>,
}

pub trait Real: Element + Default {
    const NAME: &'static str;
    fn from_f32(x: f32) -> Self;
}

impl Real for f32 {
    const NAME: &'static str = "f32";
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Real for bf16 {
    const NAME: &'static str = "bf16";
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}

impl<H: Real> Case<H> {
    pub fn new(count: usize) -> Case<H> {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let norm = (D_IN as f32).sqrt();
        let encoder: Vec<f32> = random.normals(count * D_IN).map(|w| w / norm).collect();
        let bias = vec![0.0; count];
        let sae = Sae::from_tensors(&SaeTensors {
            encoder_bias: Some(Tensor::from_slice(&bias, &[count]).unwrap()),
            ..SaeTensors::new(
                Architecture::Standard,
                D_IN,
                count,
                Tensor::from_slice(&encoder, &[count, D_IN]).unwrap(),
            )
        })
        .unwrap();
        let ids: Vec<i64> = (0..count as i64).collect();
        let signs: Vec<i8> = ids.iter().map(|id| if id % 2 == 0 { 1 } else { -1 }).collect();
        let latents = Latents::new(&ids, &signs, None).unwrap();
        let plan = Plan::new(&sae, &latents, &PlanOptions::default()).unwrap();
        let workspace = vec![0; plan.workspace_size(TOKENS) + WORKSPACE_ALIGN];
        let mut case = Case {
            name: format!("{}/K={count}", H::NAME),
            plan,
            hidden: random.normals(TOKENS * D_IN).map(H::from_f32).collect(),
            reference: vec![0.0; TOKENS * count],
            coef: vec![0.0; TOKENS * count],
            grad: vec![H::default(); TOKENS * D_IN],
            loss_sum: [0.0],
            workspace,
        };
        case.encode();
        case.reference.clone_from(&case.coef);
        case.hidden = random.normals(TOKENS * D_IN).map(H::from_f32).collect();
        case.forward();
        case
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.hidden[..]) as u64
    }

    /// Into the memory of the coefficients.
    pub fn encode(&mut self) {
        let hidden = Tensor::from_slice(&self.hidden, &[TOKENS, D_IN]).unwrap();
        let shape = [TOKENS, self.plan.num_latents()];
        let latents = TensorMut::from_slice(&mut self.coef, &shape).unwrap();
        self.plan.encode(&mut EncodeArgs::new(hidden, latents)).unwrap();
    }

    pub fn forward(&mut self) {
        self.with(true, false, |plan, args| plan.forward(args).unwrap());
    }

    pub fn backward(&mut self) {
        self.with(true, true, |plan, args| plan.backward(args).unwrap());
    }

    /// Forward and backward in one call.
    pub fn fused(&mut self) {
        self.with(false, true, |plan, args| plan.penalty(args).unwrap());
    }

    fn with(&mut self, coef: bool, grad: bool, run: impl Fn(&Plan, &mut PenaltyArgs<'_>)) {
        let count = self.plan.num_latents();
        let skip = self.workspace.as_ptr().align_offset(WORKSPACE_ALIGN);
        let mut args = PenaltyArgs {
            hidden: Some(Tensor::from_slice(&self.hidden, &[TOKENS, D_IN]).unwrap()),
            reference: Some(Tensor::from_slice(&self.reference, &[TOKENS, count]).unwrap()),
            coef: coef.then(|| TensorMut::from_slice(&mut self.coef, &[TOKENS, count]).unwrap()),
            loss_sum: Some(TensorMut::from_slice(&mut self.loss_sum, &[1]).unwrap()),
            grad_hidden: grad
                .then(|| TensorMut::from_slice(&mut self.grad, &[TOKENS, D_IN]).unwrap()),
            workspace: (&mut self.workspace[skip..]).into(),
            ..PenaltyArgs::default()
        };
        run(&self.plan, &mut args);
    }
}

/// xorshift64*: the same numbers in every run.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 24) as f32
    }

    /// Mean 0, standard deviation 1, roughly normal.
    fn normals(&mut self, n: usize) -> impl Iterator<Item = f32> + '_ {
        (0..n).map(|_| ((0..4).map(|_| self.uniform()).sum::<f32>() - 2.0) * 3f32.sqrt())
    }
}
