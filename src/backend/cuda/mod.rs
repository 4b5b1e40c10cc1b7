//! The CUDA backend: a plan's rows in device memory, and run calls that only check and launch.
//!
//! A run call pushes the plan's context, compares the stream's, asks the driver what each pointer
//! is, launches, and pops the context: no allocation, no load, no wait, so that it can be captured
//! into a graph. All that must be loaded is loaded with the plan, or by the first raw call of a
//! context.

mod driver;
mod image;
mod launch;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub(crate) use self::driver::DeviceMemory;
use self::driver::{Context, Driver, OwnStream, Pointer, Shape};
use self::image::Module;
pub(crate) use self::image::is_embedded;
use self::launch::{
    DeviceDictionary, DeviceDirections, DeviceTopK, Launch, TOKENS_AT_ONCE, packed_bytes,
};
pub(crate) use self::launch::{DeviceRows, GateKind};
use super::{
    Backend, BackwardCall, Directions, EncodeCall, Gate, Grad, Matrix, PenaltyCall, RIVALS_AT_ONCE,
    ReadRivals, ReadRows, Rows, StatsBackend, StatsCall, SteerBackend, SteerCall, TokenNormsCall,
    TopK, Workspace, bounded, side_by_side,
};
use crate::error::{Error, Result, Status, bail};
use crate::penalty::WORKSPACE_ALIGN;
use crate::tensor::{Device, Stream};

/// How many devices there are; none without a driver or without kernels, which is no error.
pub(crate) fn device_count() -> Result<i32> {
    use crate::error::Status::{CudaUnavailable, DriverTooOld, NoKernelImage};
    let count = Driver::get().and_then(|driver| {
        image::check_driver(driver.version())?;
        driver.device_count()
    });
    match count {
        Err(e) if matches!(e.status, CudaUnavailable | DriverTooOld | NoKernelImage) => Ok(0),
        count => count,
    }
}

/// Refuses a process that cannot use CUDA at all.
pub(crate) fn check_available() -> Result<()> {
    image::check_driver(Driver::get()?.version())
}

/// A plan's rows on a device.
pub(crate) struct Cuda {
    rows: DeviceRows,
    _memory: Vec<DeviceMemory>,
    module: Arc<Module>,
}

impl Cuda {
    /// Copies and packs rows in the calling thread's current context where it is one of the device,
    /// else in the device's primary context. The plan belongs to that context.
    pub fn new(rows: &Rows<'_>, rivals: ReadRivals<'_>, device: i32) -> Result<Cuda> {
        let module = module_of_device(device)?;
        let _entered = module.context.enter()?;
        let loader = Loader { module: &module, stream: OwnStream::new(&module.context)? };
        let (mut device_rows, memory) = loader.rows(rows)?;
        let mut memory = vec![memory];
        if let Gate::TopK(gate) = rows.gate {
            let (topk, rest) = loader.rivals(gate, rows, rivals)?;
            device_rows.topk = Some(topk);
            memory.push(rest);
        }
        drop((loader, _entered));
        Ok(Cuda { rows: device_rows, _memory: memory, module })
    }

    /// Enters the plan's context for a call on a stream of it.
    fn enter(&self, stream: Stream, pointers: &Pointers) -> Result<driver::Entered> {
        enter(&self.module.context, stream, pointers)
    }
}

/// The kernels in the calling thread's current context where it is one of the device, else in the
/// device's primary context.
fn module_of_device(device: i32) -> Result<Arc<Module>> {
    check_available()?;
    let context = Context::of_device(device)?;
    {
        // Before anything that a capture forbids, and that would spoil it.
        let _entered = context.enter()?;
        context.driver().check_not_capturing(std::ptr::null_mut())?;
    }
    Module::of(context, false)
}

/// Enters a handle's context for a call on a stream of it.
fn enter(context: &Context, stream: Stream, pointers: &Pointers) -> Result<driver::Entered> {
    let entered = context.enter()?;
    context.check_stream(stream.as_raw())?;
    pointers.check(context)?;
    Ok(entered)
}

/// A dictionary's rows on a device.
pub(crate) struct CudaStats {
    dictionary: DeviceDictionary,
    _memory: DeviceMemory,
    module: Arc<Module>,
}

impl CudaStats {
    /// As [`Cuda::new`].
    pub fn new(d_sae: usize, read: ReadRows<'_>, device: i32) -> Result<CudaStats> {
        let module = module_of_device(device)?;
        let _entered = module.context.enter()?;
        let loader = Loader { module: &module, stream: OwnStream::new(&module.context)? };
        let (dictionary, memory) = loader.dictionary(d_sae, read)?;
        drop((loader, _entered));
        Ok(CudaStats { dictionary, _memory: memory, module })
    }
}

impl StatsBackend for CudaStats {
    fn numerics(&self) -> String {
        self.module.numerics()
    }

    fn num_threads(&self) -> usize {
        0
    }

    fn workspace_size(&self, tokens: usize, has_base: bool) -> usize {
        bounded(self.dictionary.rows.count, tokens, || {
            launch::stats_workspace_size(&self.dictionary, tokens, has_base)
        })
    }

    unsafe fn update(&self, call: &StatsCall, stream: Stream) -> Result<()> {
        let _entered = enter(&self.module.context, stream, &Pointers::of_stats(call))?;
        // SAFETY: the caller's promise; the context is current and the stream's.
        unsafe { start_all(&self.module, launch::statistics(&self.dictionary, call), stream) }
    }
}

/// Directions on a device.
pub(crate) struct CudaSteering {
    directions: DeviceDirections,
    _memory: DeviceMemory,
    module: Arc<Module>,
}

impl CudaSteering {
    /// As [`Cuda::new`].
    pub fn new(directions: &Directions, device: i32) -> Result<CudaSteering> {
        let module = module_of_device(device)?;
        let _entered = module.context.enter()?;
        let loader = Loader { module: &module, stream: OwnStream::new(&module.context)? };
        let (directions, memory) = loader.directions(directions)?;
        drop((loader, _entered));
        Ok(CudaSteering { directions, _memory: memory, module })
    }
}

impl SteerBackend for CudaSteering {
    fn num_threads(&self) -> usize {
        0
    }

    unsafe fn steer(&self, call: &SteerCall, stream: Stream) -> Result<()> {
        let _entered = enter(&self.module.context, stream, &Pointers::of_steer(call))?;
        let work = launch::steer(&self.directions, call).into_iter();
        // SAFETY: the caller's promise; the context is current and the stream's.
        unsafe { start_all(&self.module, work, stream) }
    }
}

impl Backend for Cuda {
    fn numerics(&self) -> String {
        self.module.numerics()
    }

    fn num_threads(&self) -> usize {
        0
    }

    fn owns_stream(&self, stream: Stream) -> Result<bool> {
        self.module.context.owns_stream(stream.as_raw())
    }

    fn workspace_size(&self, tokens: usize) -> usize {
        workspace_size(&self.rows, tokens)
    }

    fn transfers(&self) -> Result<Option<Transfers>> {
        Transfers::new(&self.module.context).map(Some)
    }

    unsafe fn encode(&self, call: &EncodeCall, stream: Stream) -> Result<()> {
        let _entered = self.enter(stream, &Pointers::of_encode(call))?;
        // SAFETY: the caller's promise; the context is current and the stream's.
        unsafe { start_all(&self.module, launch::encode(&self.rows, call), stream) }
    }

    unsafe fn penalty(&self, call: &PenaltyCall, stream: Stream) -> Result<()> {
        let _entered = self.enter(stream, &Pointers::of_penalty(call))?;
        // SAFETY: as above.
        unsafe { start_all(&self.module, launch::penalty(&self.rows, call), stream) }
    }

    unsafe fn backward(&self, call: &BackwardCall, stream: Stream) -> Result<()> {
        let _entered = self.enter(stream, &Pointers::of_backward(call))?;
        // SAFETY: as above.
        unsafe { start_all(&self.module, launch::backward(&self.rows, call), stream) }
    }
}

/// Brings a plan's rows to the device, in its context.
struct Loader<'a> {
    module: &'a Module,
    stream: OwnStream,
}

impl Loader<'_> {
    fn memory(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::new(&self.module.context, bytes)
    }

    /// All of a plan but its rivals.
    fn rows(&self, rows: &Rows<'_>) -> Result<(DeviceRows, DeviceMemory)> {
        let mut parts = Parts::default();
        let packed = parts.reserve(packed_bytes(rows.products(), rows.d_in));
        let bias = parts.add(as_bytes(rows.bias));
        let sign_weight = parts.add(as_bytes(rows.sign_weight));
        let scale = rows.scale.map(|scale| parts.add(as_bytes(scale)));
        let glu_bias = rows.glu_bias.map(|bias| parts.add(as_bytes(bias)));
        let gate_values = gate_values(&rows.gate).map(|values| parts.add(as_bytes(values)));
        let memory = self.memory(parts.bytes)?;
        let at = |offset: usize| memory.address() + offset as u64;
        let device_rows = DeviceRows {
            target: self.module.target,
            d_in: rows.d_in,
            count: rows.count(),
            norm: rows.norm,
            gate: GateKind::of(&rows.gate),
            packed: at(packed),
            bias: at(bias),
            scale: scale.map_or(0, at),
            glu_bias: glu_bias.map_or(0, at),
            gate_values: gate_values.map_or(0, at),
            sign_weight: at(sign_weight),
            topk: None,
        };
        let weight = self.memory(size_of_val(rows.weight))?;
        self.copy(&memory, &parts)?;
        self.pack(&weight, rows.weight, rows.weight_stride, &device_rows)?;
        Ok((device_rows, memory))
    }

    /// A TopK gate with its rivals, which are read and packed part by part. `blocked` are of the same
    /// SAE.
    fn rivals(
        &self,
        gate: &TopK,
        blocked: &Rows<'_>,
        read: ReadRivals<'_>,
    ) -> Result<(DeviceTopK, DeviceMemory)> {
        let (d_in, width) = (blocked.d_in, blocked.width());
        let group_size = group_size(gate)?;
        let mut topk = DeviceTopK {
            k: gate.k,
            groups: gate.groups(),
            group_size,
            by_magnitude: gate.by_magnitude,
            group: 0,
            packed: 0,
            bias: 0,
            glu_bias: 0,
            gain: 0,
            at_once: RIVALS_AT_ONCE,
            tokens_at_once: TOKENS_AT_ONCE,
        };
        let mut parts = Parts::default();
        let packed = parts.reserve(topk.packed_bytes(width, d_in));
        let numbers = gate.rivals() * size_of::<f32>();
        let bias = parts.reserve(numbers);
        let glu_bias = blocked.glu_bias.map(|_| parts.reserve(numbers));
        let gain = gate.gain.as_ref().map(|_| parts.reserve(numbers));
        let group = parts.add(as_bytes(&gate.group));
        let memory = self.memory(parts.bytes).map_err(|error| {
            let remedy = "a topk SAE's 'native' activation needs them all on the device \
                          ('dense_relu' needs the blocked ones alone)";
            with_remedy(error, gate.rivals(), d_in, remedy)
        })?;
        let at = |offset: usize| memory.address() + offset as u64;
        (topk.packed, topk.bias, topk.group) = (at(packed), at(bias), at(group));
        topk.gain = gain.map_or(0, at);
        topk.glu_bias = glu_bias.map_or(0, at);
        self.copy(&memory, &parts)?;
        let most = gate.rivals().min(RIVALS_AT_ONCE) * width;
        let weight = self.memory(most * d_in * size_of::<f32>())?;
        for start in (0..gate.rivals()).step_by(RIVALS_AT_ONCE) {
            let part = topk.part(start, d_in, self.module.target);
            let mut rows = read(start..start + part.count)?;
            if let Some(gain) = &rows.rank_gain {
                if rows.glu.is_none() {
                    rows.bias.iter_mut().zip(gain).for_each(|(bias, gain)| *bias *= gain);
                }
                // SAFETY: the part's own memory; the slice outlives the wait in `pack`.
                unsafe { self.stream.copy_in(part.scale, as_bytes(gain))? };
            }
            // SAFETY: as above.
            unsafe { self.stream.copy_in(part.bias, as_bytes(&rows.bias))? };
            let (weights, glu_bias) = side_by_side(rows.weight, rows.glu, d_in);
            if let Some(bias) = &glu_bias {
                // SAFETY: as above.
                unsafe { self.stream.copy_in(part.glu_bias, as_bytes(bias))? };
            }
            self.pack(&weight, &weights, d_in, &part)?;
        }
        Ok((topk, memory))
    }

    /// All rows of a dictionary, which are read and packed part by part.
    fn dictionary(
        &self,
        d_sae: usize,
        read: ReadRows<'_>,
    ) -> Result<(DeviceDictionary, DeviceMemory)> {
        // Without a row: what all of them have.
        let none = read(0..0)?;
        let none = none.borrow();
        let kind = GateKind::of(&none.gate);
        let mut dictionary = DeviceDictionary::new(none.d_in, d_sae, none.norm, kind);
        let mut parts = Parts::default();
        let packed = parts.reserve(dictionary.packed_bytes(none.width()));
        let mut numbers = || parts.reserve(d_sae * size_of::<f32>());
        let bias = numbers();
        let scale = none.scale.map(|_| numbers());
        let glu_bias = none.glu_bias.map(|_| numbers());
        let values = gate_values(&none.gate).map(|_| numbers());
        let rivals = (kind == GateKind::TopK).then(|| (numbers(), numbers()));
        let memory = self.memory(parts.bytes).map_err(|error| {
            let remedy = "statistics keep every latent on the device";
            with_remedy(error, d_sae, none.d_in, remedy)
        })?;
        let at = |offset: usize| memory.address() + offset as u64;
        let rows = &mut dictionary.rows;
        rows.target = self.module.target;
        (rows.packed, rows.bias) = (at(packed), at(bias));
        (rows.scale, rows.gate_values) = (scale.map_or(0, at), values.map_or(0, at));
        rows.glu_bias = glu_bias.map_or(0, at);
        if let (Gate::TopK(gate), Some((group, rival_bias))) = (none.gate, rivals) {
            rows.topk = Some(DeviceTopK {
                k: gate.k,
                groups: gate.groups(),
                group_size: group_size(gate)?,
                by_magnitude: gate.by_magnitude,
                group: at(group),
                packed: rows.packed,
                bias: at(rival_bias),
                glu_bias: rows.glu_bias,
                gain: rows.gate_values,
                at_once: dictionary.at_once,
                tokens_at_once: dictionary.tokens_at_once,
            });
        }
        let at_once = dictionary.at_once.min(d_sae);
        let weight = self.memory(at_once * none.width() * none.d_in * size_of::<f32>())?;
        for start in (0..d_sae).step_by(at_once) {
            let some = read(start..d_sae.min(start + at_once))?;
            self.part(&dictionary, start, &some.borrow(), &weight)?;
        }
        Ok((dictionary, memory))
    }

    /// Brings a part of a dictionary to its place.
    fn part(
        &self,
        dictionary: &DeviceDictionary,
        start: usize,
        some: &Rows<'_>,
        weight: &DeviceMemory,
    ) -> Result<()> {
        let part = dictionary.part(start);
        let mut copies = vec![(part.bias, as_bytes(some.bias))];
        copies.extend(some.scale.map(|scale| (part.scale, as_bytes(scale))));
        copies.extend(some.glu_bias.map(|bias| (part.glu_bias, as_bytes(bias))));
        copies.extend(gate_values(&some.gate).map(|values| (part.gate_values, as_bytes(values))));
        let mut rival_bias = some.bias.to_vec();
        if let (Gate::TopK(gate), Some(topk)) = (some.gate, part.topk) {
            if let (Some(gain), None) = (&gate.gain, some.glu_bias) {
                rival_bias.iter_mut().zip(gain).for_each(|(bias, gain)| *bias *= gain);
            }
            copies.push((topk.group, as_bytes(&gate.group)));
            copies.push((topk.bias + (start * size_of::<f32>()) as u64, as_bytes(&rival_bias)));
        }
        for (address, bytes) in copies {
            // SAFETY: the part's own memory; the slices outlive the wait in `pack`.
            unsafe { self.stream.copy_in(address, bytes)? };
        }
        self.pack(weight, some.weight, some.weight_stride, &part)
    }

    /// Directions, each from sixteen bytes on.
    fn directions(&self, directions: &Directions) -> Result<(DeviceDirections, DeviceMemory)> {
        let stride = DeviceDirections::stride(directions.d_in);
        let mut padded = vec![0.0f32; directions.count() * stride];
        for (n, row) in padded.chunks_exact_mut(stride).enumerate() {
            row[..directions.d_in].copy_from_slice(directions.row(n));
        }
        let mut parts = Parts::default();
        parts.add(as_bytes(&padded));
        let memory = self.memory(parts.bytes)?;
        self.copy(&memory, &parts)?;
        let (d_in, count, rows) = (directions.d_in, directions.count(), memory.address());
        Ok((DeviceDirections { d_in, count, rows }, memory))
    }

    fn copy(&self, memory: &DeviceMemory, parts: &Parts<'_>) -> Result<()> {
        for (offset, bytes) in &parts.copies {
            // SAFETY: every copy stays within its part of the memory, and the slices outlive the
            // wait.
            unsafe { self.stream.copy_in(memory.address() + *offset as u64, bytes)? };
        }
        self.stream.synchronize()
    }

    /// Packs rows by way of memory that holds them as they are, and waits.
    fn pack(
        &self,
        space: &DeviceMemory,
        weight: &[f32],
        stride: usize,
        rows: &DeviceRows,
    ) -> Result<()> {
        let pack = launch::pack(space.address(), stride, rows);
        // SAFETY: the space holds the rows, the slice outlives the wait, and so does our stream.
        unsafe {
            self.stream.copy_in(space.address(), as_bytes(weight))?;
            start(self.module, &pack, false, Stream::from_raw(self.stream.as_raw()))?;
        }
        self.stream.synchronize()
    }
}

/// Rivals of each group, of which all have as many.
fn group_size(gate: &TopK) -> Result<usize> {
    let group_size = gate.rivals() / gate.groups().max(1);
    if gate.group_ends.iter().enumerate().any(|(g, end)| *end != (g + 1) * group_size) {
        bail!(Internal, "the groups of a topk gate differ in size");
    }
    Ok(group_size)
}

fn with_remedy(error: Error, count: usize, d_in: usize, remedy: &str) -> Error {
    if error.status != Status::OutOfMemory {
        return error;
    }
    let message =
        format!("{}: {count} latents of {d_in} inputs do not fit; {remedy}", error.message);
    Error { message, ..error }
}

/// Copies between the host and a plan's device, for callers who bring host arrays.
pub(crate) struct Transfers {
    context: Arc<Context>,
    stream: OwnStream,
}

impl Transfers {
    fn new(context: &Arc<Context>) -> Result<Transfers> {
        let _entered = context.enter()?;
        Ok(Transfers { context: context.clone(), stream: OwnStream::new(context)? })
    }

    /// Calls and copies on it run one after the other.
    pub fn stream(&self) -> Stream {
        // SAFETY: the stream lives as long as this; whoever launches on it calls `wait`.
        unsafe { Stream::from_raw(self.stream.as_raw()) }
    }

    pub fn device(&self) -> Device {
        Device::Cuda(self.context.device_index())
    }

    pub fn space(&self, bytes: usize) -> Result<DeviceMemory> {
        let _entered = self.context.enter()?;
        DeviceMemory::new(&self.context, bytes)
    }

    pub fn upload(&self, bytes: &[u8]) -> Result<DeviceMemory> {
        let _entered = self.context.enter()?;
        let memory = DeviceMemory::new(&self.context, bytes.len())?;
        // SAFETY: as many bytes, and the slice outlives the wait.
        unsafe { self.stream.copy_in(memory.address(), bytes)? };
        self.stream.synchronize()?;
        Ok(memory)
    }

    /// Until all work on the stream is done.
    pub fn wait(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        self.stream.synchronize()
    }

    /// Waits for all work on the stream, too. `memory` holds as many bytes.
    pub fn download(&self, memory: &DeviceMemory, bytes: &mut [u8]) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: as many bytes, and the slice outlives the wait.
        unsafe { self.stream.copy_out(bytes, memory.address())? };
        self.stream.synchronize()
    }
}

// ---- Calls without a plan ----------------------------------------------------------------------

/// Rows of a raw call: f32 weights and the rest in the caller's device memory, packed by the call
/// itself into the head of its workspace.
#[derive(Clone, Copy)]
pub(crate) struct RawDeviceRows {
    /// `packed` is not set.
    pub rows: DeviceRows,
    pub weight: Matrix,
    pub device: i32,
}

/// Bytes of workspace that the raw calls need, at a multiple of 64.
pub(crate) fn raw_workspace_size(count: usize, d_in: usize, tokens: usize) -> usize {
    let rows = DeviceRows { d_in, count, ..DeviceRows::default() };
    let work = workspace_size(&rows, tokens);
    packed_part(count, d_in).saturating_add(work).min(isize::MAX as usize)
}

/// # Safety
/// As [`Backend`]; the workspace has [`raw_workspace_size`] bytes.
pub(crate) unsafe fn raw_penalty(
    raw: &RawDeviceRows,
    call: &PenaltyCall,
    stream: Stream,
) -> Result<()> {
    let mut pointers = Pointers::of_penalty(call);
    let (rows, workspace) = raw.packed_into(call.workspace);
    let call = PenaltyCall { workspace, ..*call };
    // SAFETY: the caller's promise.
    unsafe { raw.start(&mut pointers, rows, |rows| launch::penalty(rows, &call), stream) }
}

/// # Safety
/// As [`raw_penalty`].
pub(crate) unsafe fn raw_backward(
    raw: &RawDeviceRows,
    call: &BackwardCall,
    workspace: Workspace,
    stream: Stream,
) -> Result<()> {
    // No norm: hidden states are not read.
    let call = &BackwardCall { hidden: None, ..*call };
    let mut pointers = Pointers::of_backward(call);
    pointers.add("workspace", workspace.data);
    let (rows, _) = raw.packed_into(workspace);
    // SAFETY: the caller's promise.
    unsafe { raw.start(&mut pointers, rows, |rows| launch::backward(rows, call), stream) }
}

/// # Safety
/// As [`raw_penalty`], without a workspace.
pub(crate) unsafe fn token_norms(call: &TokenNormsCall, device: i32, stream: Stream) -> Result<()> {
    check_available()?;
    let module = raw_module(device, stream)?;
    let _entered = module.context.enter()?;
    let mut pointers = Pointers::default();
    pointers.add("hidden", call.hidden.data);
    pointers.add("norms", call.norms.data);
    pointers.check(&module.context)?;
    // SAFETY: the caller's promise; the context is current and the stream's.
    unsafe { start_all(&module, launch::token_norms(call).into_iter(), stream) }
}

impl RawDeviceRows {
    /// The rows with their packed form at the head of a workspace, and the rest of it.
    fn packed_into(&self, workspace: Workspace) -> (DeviceRows, Workspace) {
        let used = packed_part(self.rows.count, self.rows.d_in);
        let rows = DeviceRows { packed: workspace.data.addr() as u64, ..self.rows };
        let rest =
            Workspace { data: workspace.data.wrapping_add(used), size: workspace.size - used };
        (rows, rest)
    }

    /// # Safety
    /// The addresses of the launches are valid until their work is done.
    unsafe fn start<Work: Iterator<Item = Launch>>(
        &self,
        pointers: &mut Pointers,
        rows: DeviceRows,
        work: impl FnOnce(&DeviceRows) -> Work,
        stream: Stream,
    ) -> Result<()> {
        check_available()?;
        let module = raw_module(self.device, stream)?;
        let _entered = module.context.enter()?;
        pointers.add("weight", self.weight.data);
        for (name, address) in [
            ("bias", self.rows.bias),
            ("gate_scale", self.rows.scale),
            ("threshold or gate_bias", self.rows.gate_values),
            ("sign_weight", self.rows.sign_weight),
        ] {
            pointers.add(name, address as *const u8);
        }
        pointers.check(&module.context)?;
        let rows = DeviceRows { target: module.target, ..rows };
        let pack = launch::pack(self.weight.data.addr() as u64, self.weight.row_stride, &rows);
        for launch in std::iter::once(pack).chain(work(&rows)) {
            // SAFETY: the caller's promise; the context is current and the stream's.
            unsafe { start(&module, &launch, false, stream)? };
        }
        Ok(())
    }
}

/// The kernels in the stream's context, loaded by the first raw call there.
fn raw_module(device: i32, stream: Stream) -> Result<Arc<Module>> {
    let found = Context::id_of_stream(device, stream.as_raw())?;
    if let Some(module) = Module::pinned(device, found) {
        return Ok(module);
    }
    let context = Context::of_stream(device, stream.as_raw())?;
    {
        let _entered = context.enter()?;
        context.driver().check_not_capturing(stream.as_raw())?;
    }
    Module::of(context, true)
}

/// The packed form at the head of a workspace; what follows keeps the workspace's alignment.
fn packed_part(count: usize, d_in: usize) -> usize {
    bounded(count, d_in, || packed_bytes(count, d_in).next_multiple_of(WORKSPACE_ALIGN))
}

fn workspace_size(rows: &DeviceRows, tokens: usize) -> usize {
    bounded(rows.count, tokens, || launch::workspace_size(rows, tokens))
}

// ---- Launches and pointers ---------------------------------------------------------------------

/// # Safety
/// The module's context is current, the stream is one of it, and the addresses of the launches are
/// valid until their work is done.
unsafe fn start_all(
    module: &Module,
    launches: impl Iterator<Item = Launch>,
    stream: Stream,
) -> Result<()> {
    for launch in launches {
        // SAFETY: the caller's promise.
        unsafe { start(module, &launch, module.overlaps, stream)? };
    }
    Ok(())
}

/// One that overlaps may begin while the kernel before it ends, and reads then what belongs to its plan
/// (kernels/device.cuh). A raw call has no plan: the kernel before may have written all that it reads.
///
/// # Safety
/// As [`start_all`].
unsafe fn start(module: &Module, launch: &Launch, overlaps: bool, stream: Stream) -> Result<()> {
    let &Launch { kernel, grid, cluster, block, shared, ref params } = launch;
    let (driver, function) = (module.context.driver(), module.function(kernel)?);
    let shape = Shape { grid, cluster, block, shared, overlaps };
    // SAFETY: the caller's promise; the parameters are the kernel's.
    unsafe { function.launch(driver, &shape, params.as_ptr(), stream.as_raw()) }
}

/// The distinct pointers of a call, with their names.
#[derive(Default)]
struct Pointers {
    given: [(&'static str, u64); Pointers::MOST],
    count: usize,
}

impl Pointers {
    const MOST: usize = 16;

    fn of_encode(call: &EncodeCall) -> Pointers {
        let mut pointers = Pointers::default();
        pointers.add("hidden", call.hidden.data);
        pointers.add("latents", call.latents.data);
        pointers.add("workspace", call.workspace.data);
        pointers
    }

    fn of_penalty(call: &PenaltyCall) -> Pointers {
        let mut pointers = Pointers::default();
        pointers.add("hidden", call.hidden.data);
        pointers.add("reference", call.reference.data);
        pointers.add("mask", call.mask.map_or(std::ptr::null(), |m| m.data));
        pointers.add("coef", call.coef.map_or(std::ptr::null_mut(), |m| m.data));
        let outputs = [
            ("loss_sum", &call.loss_sum),
            ("token_count", &call.token_count),
            ("latent_loss", &call.latent_loss),
        ];
        for (name, output) in outputs {
            pointers.add(name, output.map_or(std::ptr::null_mut(), |o| o.data));
        }
        if let Some(grad) = &call.grad {
            pointers.add_grad(grad);
        }
        pointers.add("workspace", call.workspace.data);
        pointers
    }

    fn of_backward(call: &BackwardCall) -> Pointers {
        let mut pointers = Pointers::default();
        pointers.add("coef", call.coef.data);
        pointers.add_grad(&call.grad);
        pointers.add("hidden", call.hidden.map_or(std::ptr::null_mut(), |m| m.data));
        pointers.add("workspace", call.workspace.data);
        pointers
    }

    fn of_stats(call: &StatsCall) -> Pointers {
        let mut pointers = Pointers::default();
        pointers.add("hidden", call.hidden.data);
        pointers.add("base_hidden", call.base_hidden.map_or(std::ptr::null_mut(), |m| m.data));
        pointers.add("mask", call.mask.map_or(std::ptr::null(), |m| m.data));
        pointers.add("state", call.state.data);
        pointers.add("token_count", call.token_count.unwrap_or(std::ptr::null_mut()).cast());
        pointers.add("workspace", call.workspace.data);
        pointers
    }

    fn of_steer(call: &SteerCall) -> Pointers {
        let mut pointers = Pointers::default();
        pointers.add("hidden", call.hidden.data);
        pointers.add("row", call.row.data.cast());
        pointers.add("strength", call.strength.data.cast());
        pointers.add("mask", call.mask.map_or(std::ptr::null(), |m| m.data));
        pointers.add("scale_tensor", call.scale_tensor.unwrap_or(std::ptr::null()).cast());
        pointers
    }

    fn add_grad(&mut self, grad: &Grad) {
        self.add("grad_hidden", grad.rows.data);
        self.add("scale_tensor", grad.scale_tensor.unwrap_or(std::ptr::null()).cast());
    }

    /// NULL is absent, or a tensor without elements.
    fn add(&mut self, name: &'static str, pointer: *const u8) {
        let address = pointer.addr() as u64;
        let known = self.given[..self.count].iter().any(|(_, other)| *other == address);
        if address != 0 && !known {
            self.given[self.count] = (name, address);
            self.count += 1;
        }
    }

    /// Device memory of the context's device, or managed memory. Pinned host memory is refused: a
    /// device could reach it, at a small part of the speed, and nobody means that.
    fn check(&self, context: &Context) -> Result<()> {
        let index = context.device_index();
        for (name, address) in &self.given[..self.count] {
            match context.driver().pointer(*address)? {
                Pointer::Device(device, owner) if device == index && context.owns(owner) => {}
                Pointer::Managed => {}
                Pointer::Device(device, _) if device == index => bail!(
                    DeviceMismatch,
                    "{name} is memory of another CUDA context of cuda:{index} than the plan's, which \
                     cannot reach it; make the plan where that context is current"
                ),
                Pointer::Device(device, _) => bail!(
                    DeviceMismatch,
                    "{name} is memory of cuda:{device}, the call runs on cuda:{index}"
                ),
                Pointer::Host => bail!(
                    DeviceMismatch,
                    "{name} is pinned host memory, the call runs on cuda:{index}; copy it to the \
                     device"
                ),
                Pointer::Unknown => bail!(
                    DeviceMismatch,
                    "{name} ({address:#x}) is no memory of cuda:{index}: it is host memory, or was \
                     freed"
                ),
            }
        }
        Ok(())
    }
}

/// Where each array of a plan lies in its one allocation.
#[derive(Default)]
struct Parts<'a> {
    bytes: usize,
    copies: Vec<(usize, &'a [u8])>,
}

impl<'a> Parts<'a> {
    fn reserve(&mut self, bytes: usize) -> usize {
        const ALIGN: usize = 256;
        let offset = self.bytes;
        self.bytes = (offset + bytes).next_multiple_of(ALIGN);
        offset
    }

    fn add(&mut self, bytes: &'a [u8]) -> usize {
        let offset = self.reserve(bytes.len());
        self.copies.push((offset, bytes));
        offset
    }
}

/// Numbers without padding.
trait Number: Copy {}
impl Number for f32 {}
impl Number for u32 {}

fn as_bytes<T: Number>(values: &[T]) -> &[u8] {
    // SAFETY: numbers are plain bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

impl GateKind {
    fn of(gate: &Gate<'_>) -> GateKind {
        match gate {
            Gate::Open => GateKind::Open,
            Gate::Relu => GateKind::Relu,
            Gate::Threshold(_) => GateKind::Threshold,
            Gate::Gated(_) => GateKind::Gated,
            Gate::TopK(_) => GateKind::TopK,
        }
    }
}

fn gate_values<'a>(gate: &Gate<'a>) -> Option<&'a [f32]> {
    match gate {
        Gate::Open | Gate::Relu => None,
        Gate::TopK(gate) => gate.gain.as_deref(),
        Gate::Threshold(values) | Gate::Gated(values) => Some(values),
    }
}
