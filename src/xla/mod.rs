//! The penalty as custom calls of XLA, for JAX and whoever else builds XLA programs.
//!
//! A program is compiled once and runs on any device, maybe in another process, so it cannot hold a
//! plan: it carries the plan's name (the attribute "plan"), to which the process has bound one plan
//! for each of its devices. Arrays may have further leading dimensions, which vmap adds: the call
//! is then made for each of what they hold.

mod frame;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub use self::frame::Frame;
use self::frame::{Array, count};
use crate::error::{Result, bail};
use crate::penalty::{EncodeArgs, PenaltyArgs, Scratch, WORKSPACE_ALIGN};
use crate::plan::Plan;
use crate::tensor::{DType, Device, Stream};

/// Whose program calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    Cpu,
    Cuda,
}

/// Makes a plan known to programs by a name, for as long as the plan lives.
pub fn bind(plan: &Arc<Plan>, name: &str) {
    let mut bound = BOUND.lock().unwrap_or_else(PoisonError::into_inner);
    bound.retain(|_, plans| {
        plans.retain(|plan| plan.strong_count() > 0);
        !plans.is_empty()
    });
    let plans = bound.entry(name.to_owned()).or_default();
    if !plans.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(plan))) {
        plans.push(Arc::downgrade(plan));
    }
}

/// Programs name plans; only the process knows where they are.
static BOUND: Mutex<BTreeMap<String, Vec<Weak<Plan>>>> = Mutex::new(BTreeMap::new());

/// What a call computes.
pub type Work = unsafe fn(&Call<'_>) -> Result<()>;

/// Runs a call, unless XLA only asks about the handler.
///
/// # Safety
/// A frame that XLA made for a program of the platform.
pub unsafe fn run(frame: &Frame, platform: Platform, work: Work) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        if frame.is_question(platform == Platform::Cuda) {
            return Ok(());
        }
        work(&Call::new(frame, platform)?)
    }
}

/// z: hidden [.., T, d] to latents [.., T, K]; a workspace.
///
/// # Safety
/// As [`run`].
pub unsafe fn encode(call: &Call<'_>) -> Result<()> {
    // SAFETY: XLA's buffers are what their dimensions say.
    unsafe {
        let hidden = call.frame.input(0, "hidden")?;
        let (lead, rows) = call.rows(&hidden)?;
        let latents = call.frame.output(0, "latents")?.expect_lead(1, hidden.lead(1)?)?;
        let workspace = call.frame.output(1, "workspace")?;
        // Without a workspace, which is as large as one call's, all rows are one call's.
        let (calls, rows) = match call.plan.encode_needs_workspace() {
            true => (count(lead), rows),
            false => (1, count(lead) * rows),
        };
        for n in 0..calls {
            call.plan.encode_on(
                call.stream,
                &mut EncodeArgs {
                    hidden: hidden.at(n, &[rows, hidden.width()], call.device)?,
                    latents: latents.at_mut(n, &[rows, latents.width()], call.device)?,
                    workspace: scratch(&workspace),
                },
            )?;
        }
        Ok(())
    }
}

/// hidden [.., T, d], reference [.., T, K] and maybe mask [.., T] to loss_sum [..], token_count
/// [..], latent_loss [.., K] (or [.., 0]: not asked for), coef [.., T, K]; a workspace.
///
/// # Safety
/// As [`run`].
pub unsafe fn forward(call: &Call<'_>) -> Result<()> {
    // SAFETY: XLA's buffers are what their dimensions say.
    unsafe {
        let frame = call.frame;
        let hidden = frame.input(0, "hidden")?;
        let (lead, rows) = call.rows(&hidden)?;
        let tokens = hidden.lead(1)?;
        let reference = frame.input(1, "reference")?.expect_lead(1, tokens)?;
        let mask = frame.optional_input(2, "mask")?;
        let mask = mask.map(|mask| mask.expect_lead(0, tokens)).transpose()?;
        let loss_sum = frame.output(0, "loss_sum")?.expect_lead(0, lead)?;
        let token_count = frame.output(1, "token_count")?.expect_lead(0, lead)?;
        let latent_loss = frame.output(2, "latent_loss")?.expect_lead(1, lead)?;
        let coef = frame.output(3, "coef")?.expect_lead(1, tokens)?;
        let workspace = frame.output(4, "workspace")?;
        let per_latent = (latent_loss.width() > 0).then_some(latent_loss);
        for n in 0..count(lead) {
            let mut args = PenaltyArgs {
                hidden: Some(hidden.at(n, &[rows, hidden.width()], call.device)?),
                reference: Some(reference.at(n, &[rows, reference.width()], call.device)?),
                mask: mask.map(|mask| mask.at(n, &[rows], call.device)).transpose()?,
                coef: Some(coef.at_mut(n, &[rows, coef.width()], call.device)?),
                loss_sum: Some(loss_sum.at_mut(n, &[1], call.device)?),
                token_count: Some(token_count.at_mut(n, &[1], call.device)?),
                latent_loss: None,
                workspace: scratch(&workspace),
                ..PenaltyArgs::default()
            };
            if let Some(shares) = &per_latent {
                args.latent_loss = Some(shares.at_mut(n, &[shares.width()], call.device)?);
            }
            call.plan.forward_on(call.stream, &mut args)?;
        }
        Ok(())
    }
}

/// coef [.., T, K], upstream [..] and, where the plan's gradient needs it, hidden [.., T, d] to
/// grad_hidden [.., T, d]; a workspace.
///
/// # Safety
/// As [`run`].
pub unsafe fn backward(call: &Call<'_>) -> Result<()> {
    // SAFETY: XLA's buffers are what their dimensions say.
    unsafe {
        let frame = call.frame;
        let coef = frame.input(0, "coef")?;
        let (lead, rows) = call.rows(&coef)?;
        let upstream = frame.input(1, "upstream")?.expect_lead(0, lead)?;
        let hidden = frame.optional_input(2, "hidden")?;
        let hidden = hidden.map(|hidden| hidden.expect_lead(1, coef.lead(1)?)).transpose()?;
        let grad = frame.output(0, "grad_hidden")?.expect_lead(1, coef.lead(1)?)?;
        let workspace = frame.output(1, "workspace")?;
        for n in 0..count(lead) {
            let mut args = PenaltyArgs {
                coef: Some(coef.at_mut(n, &[rows, coef.width()], call.device)?),
                grad_hidden: Some(grad.at_mut(n, &[rows, grad.width()], call.device)?),
                workspace: scratch(&workspace),
                ..PenaltyArgs::default()
            };
            if let Some(hidden) = &hidden {
                args.hidden = Some(hidden.at(n, &[rows, hidden.width()], call.device)?);
            }
            match (upstream.dtype(), call.device) {
                // It is in host memory there, and scale_tensor is f32.
                (DType::F64, Device::Cpu) => args.scale = upstream.f64_at(n)?,
                _ => args.scale_tensor = Some(upstream.at(n, &[1], call.device)?),
            }
            call.plan.backward_on(call.stream, &mut args)?;
        }
        Ok(())
    }
}

/// A call with the plan that its program names.
pub struct Call<'a> {
    frame: &'a Frame,
    /// Lives until the call's work is on the stream, whatever its owner does.
    plan: Arc<Plan>,
    device: Device,
    stream: Stream,
}

impl<'a> Call<'a> {
    /// # Safety
    /// As [`run`].
    unsafe fn new(frame: &'a Frame, platform: Platform) -> Result<Call<'a>> {
        // SAFETY: the caller's promise.
        let (name, stream) = unsafe {
            let stream = match platform {
                Platform::Cpu => Stream::NULL,
                Platform::Cuda => frame.stream()?,
            };
            (frame.text("plan")?, stream)
        };
        let plan = find(name, platform, stream)?;
        Ok(Call { frame, device: plan.device(), plan, stream })
    }

    /// What [.., T, n] holds beside: the leading dimensions, and T.
    fn rows<'b>(&self, matrix: &Array<'b>) -> Result<(&'b [i64], usize)> {
        let lead = matrix.lead(2)?;
        Ok((lead, count(&matrix.lead(1)?[lead.len()..])))
    }
}

/// The plan of a name that works where the program runs.
fn find(name: &str, platform: Platform, stream: Stream) -> Result<Arc<Plan>> {
    let plans: Vec<Arc<Plan>> = {
        let bound = BOUND.lock().unwrap_or_else(PoisonError::into_inner);
        bound.get(name).into_iter().flatten().filter_map(Weak::upgrade).collect()
    };
    for plan in &plans {
        let is_there = match (platform, plan.device()) {
            (Platform::Cpu, Device::Cpu) => true,
            (Platform::Cuda, Device::Cuda(_)) => plan.owns_stream(stream)?,
            _ => false,
        };
        if is_there {
            return Ok(plan.clone());
        }
    }
    if plans.is_empty() {
        bail!(
            InvalidArgument,
            "this process has no plan {name}: keep the Plan for as long as what was compiled with \
             it, and make one before running a program of another process"
        );
    }
    let places: Vec<String> = plans.iter().map(|plan| place(plan.device())).collect();
    bail!(
        DeviceMismatch,
        "the program runs on {}, and its plan {name} is on {}: give the call a plan of every \
         device that it runs on",
        if platform == Platform::Cpu { "the CPU" } else { "another CUDA device" },
        places.join(", ")
    )
}

fn place(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(index) => format!("cuda:{index}"),
    }
}

/// An output that nobody reads: memory for intermediate results. Calls on one stream take turns.
///
/// # Safety
/// An output of XLA's, as large as its dimensions say.
unsafe fn scratch<'a>(workspace: &Array<'a>) -> Scratch<'a> {
    let (data, size) = workspace.aligned(WORKSPACE_ALIGN);
    // SAFETY: the caller's promise; the frame's memory lives until the work is done.
    unsafe { Scratch::from_raw(data, size) }
}
