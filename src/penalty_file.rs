//! The penalty of arrays in a file, for callers without a trainer: what `blockem penalty` runs.
//!
//! Tokens are taken in parts, so a file may be larger than memory, that of a device included.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::Map;

use crate::backend::cuda::{DeviceMemory, Transfers};
use crate::error::{Error, Result, Status, bail};
use crate::output::{TensorEntry, safetensors_header, write_whole};
use crate::penalty::{EncodeArgs, PenaltyArgs, Scratch, WORKSPACE_ALIGN};
use crate::plan::Plan;
use crate::sae::{Array, Container};
use crate::tensor::{DType, Device, Stream, Tensor, TensorMut};

/// Bytes of hidden states that are held at once.
const PART_BYTES: usize = 64 << 20;

/// The two numbers of the penalty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    pub loss_sum: f64,
    pub token_count: f64,
}

/// Reads `hidden` [T, d], `reference_hidden` [T, d] or `reference` [T, K], and optionally `mask`
/// [T] from the safetensors file `input`; writes `latents`, `reference` [T, K] f32, `loss_sum`,
/// `token_count` [1] f64, `latent_loss` [K] f64 and `grad_hidden` [T, d] f32 to `output`, whole or
/// not at all. `progress` hears (tokens done, T).
pub fn penalty_file(
    plan: &Plan,
    input: &Path,
    output: &Path,
    scale: f64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Totals> {
    let file = Container::open(input)?;
    let input = Input::find(&file, plan)?;
    let layout = Layout::new(plan, input.tokens)?;
    let mut totals = Totals { loss_sum: 0.0, token_count: 0.0 };
    let transfers = plan.backend.transfers()?;
    write_whole(output, |out| {
        let mut write = |at: u64, bytes: &[u8]| {
            let done = out.seek(SeekFrom::Start(at)).and_then(|_| out.write_all(bytes));
            done.map_err(|e| Error::io(output, "write the output file", &e))
        };
        write(0, &layout.header)?;
        let mut latent_loss = vec![0.0; plan.num_latents()];
        let rows = (PART_BYTES / (plan.d_in() * 4)).max(1);
        let mut start = 0;
        loop {
            let count = rows.min(input.tokens - start);
            let part = input.penalty_of(plan, transfers.as_ref(), start, count, scale)?;
            for (to, array) in layout.per_token.iter().zip(part.arrays) {
                write(to.row(start), array.fetch()?.as_bytes())?;
            }
            totals.loss_sum += part.loss_sum.fetch()?.to_f64()[0];
            totals.token_count += part.token_count.fetch()?.to_f64()[0];
            let losses = part.latent_loss.fetch()?.to_f64();
            latent_loss.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
            start += count;
            progress(start as u64, input.tokens as u64);
            if start == input.tokens {
                break;
            }
        }
        let numbers = [&[totals.loss_sum][..], &[totals.token_count], &latent_loss];
        for (at, values) in layout.totals.iter().zip(numbers) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            write(*at, &bytes)?;
        }
        Ok(())
    })?;
    Ok(totals)
}

/// The arrays of the input file, checked against the plan, not read.
struct Input {
    tokens: usize,
    hidden: Array,
    reference: Reference,
    mask: Option<Array>,
}

enum Reference {
    /// [T, K] f32
    Latents(Array),
    /// [T, d]
    Hidden(Array),
}

impl Input {
    fn find(file: &Container, plan: &Plan) -> Result<Input> {
        const HIDDEN: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
        const MASK: [DType; 4] = [DType::U8, DType::Bool, DType::F32, DType::I64];
        let (d, k) = (plan.d_in(), plan.num_latents());
        let hidden = file.need("hidden")?;
        let tokens = hidden.shape().first().copied().unwrap_or(0);
        expect(&hidden, &[tokens, d], "tokens, columns of the SAE", &HIDDEN)?;
        let reference = match (file.find("reference_hidden")?, file.find("reference")?) {
            (Some(array), None) => {
                expect(&array, &[tokens, d], "tokens, columns of the SAE", &HIDDEN)?;
                Reference::Hidden(array)
            }
            (None, Some(array)) => {
                expect(&array, &[tokens, k], "tokens, blocked latents", &[DType::F32])?;
                Reference::Latents(array)
            }
            (Some(_), Some(_)) => bail!(
                Format,
                "{}: holds both reference_hidden and reference; keep one",
                file.file().path().display()
            ),
            (None, None) => bail!(
                TensorMissing,
                "{}: needs the tensor reference_hidden [T, {d}] (the base model's hidden states) \
                 or reference [T, {k}] (its latents)",
                file.file().path().display()
            ),
        };
        let mask = file.find("mask")?;
        if let Some(mask) = &mask {
            expect(mask, &[tokens], "tokens", &MASK)?;
        }
        Ok(Input { tokens, hidden, reference, mask })
    }

    fn penalty_of<'d>(
        &self,
        plan: &Plan,
        transfers: Option<&'d Transfers>,
        start: usize,
        count: usize,
        scale: f64,
    ) -> Result<Part<'d>> {
        let (d, k) = (plan.d_in(), plan.num_latents());
        let stream = transfers.map_or(Stream::NULL, Transfers::stream);
        let read = |array| Memory::place(Rows::read(array, start, count)?, transfers);
        let space = |dtype, len: usize| Memory::space(dtype, len, transfers);
        let wait = || transfers.map_or(Ok(()), Transfers::wait);
        let encode = |hidden: &Memory<'_>| -> Result<Memory<'d>> {
            let mut z = space(DType::F32, count * k)?;
            let needed = if plan.encode_needs_workspace() { plan.workspace_size(count) } else { 0 };
            let mut workspace = space(DType::U8, needed + WORKSPACE_ALIGN)?;
            let mut args = EncodeArgs {
                hidden: hidden.tensor(&[count, d])?,
                latents: z.tensor_mut(&[count, k])?,
                workspace: workspace.scratch(needed),
            };
            plan.encode_on(stream, &mut args)?;
            wait()?;
            Ok(z)
        };
        let hidden = read(&self.hidden)?;
        let latents = encode(&hidden)?;
        let reference = match &self.reference {
            Reference::Hidden(array) => encode(&read(array)?)?,
            Reference::Latents(array) => read(array)?,
        };
        let mask = match &self.mask {
            Some(array) => Some(Memory::place(Rows::read(array, start, count)?.mask(), transfers)?),
            None => None,
        };
        let mut part = Part {
            arrays: [latents, reference, space(DType::F32, count * d)?],
            loss_sum: space(DType::F64, 1)?,
            token_count: space(DType::F64, 1)?,
            latent_loss: space(DType::F64, k)?,
        };
        let [_, reference, grad] = &mut part.arrays;
        let needed = plan.workspace_size(count);
        let mut workspace = space(DType::U8, needed + WORKSPACE_ALIGN)?;
        plan.penalty_on(
            stream,
            &mut PenaltyArgs {
                hidden: Some(hidden.tensor(&[count, d])?),
                reference: Some(reference.tensor(&[count, k])?),
                mask: mask.as_ref().map(|mask| mask.tensor(&[count])).transpose()?,
                loss_sum: Some(part.loss_sum.tensor_mut(&[1])?),
                token_count: Some(part.token_count.tensor_mut(&[1])?),
                latent_loss: Some(part.latent_loss.tensor_mut(&[k])?),
                grad_hidden: Some(grad.tensor_mut(&[count, d])?),
                scale,
                workspace: workspace.scratch(needed),
                ..PenaltyArgs::default()
            },
        )?;
        wait()?;
        Ok(part)
    }
}

fn expect(array: &Array, shape: &[usize], meaning: &str, dtypes: &[DType]) -> Result<()> {
    array.expect_shape(shape, meaning)?;
    if dtypes.contains(&array.dtype()) {
        return Ok(());
    }
    let accepted: Vec<&str> = dtypes.iter().map(|d| d.name()).collect();
    let text = format!("is {}; it must be {}", array.dtype().name(), accepted.join(" or "));
    Err(array.fault(Status::Dtype, text))
}

/// Results of one part of the tokens.
struct Part<'d> {
    /// latents, reference, grad_hidden
    arrays: [Memory<'d>; 3],
    loss_sum: Memory<'d>,
    token_count: Memory<'d>,
    latent_loss: Memory<'d>,
}

/// An array where the plan computes.
enum Memory<'d> {
    Host(Rows),
    Device { transfers: &'d Transfers, memory: DeviceMemory, bytes: usize, dtype: DType },
}

impl<'d> Memory<'d> {
    fn place(rows: Rows, transfers: Option<&'d Transfers>) -> Result<Memory<'d>> {
        let Some(transfers) = transfers else { return Ok(Memory::Host(rows)) };
        let memory = transfers.upload(rows.as_bytes())?;
        Ok(Memory::Device { transfers, memory, bytes: rows.bytes, dtype: rows.dtype })
    }

    fn space(dtype: DType, len: usize, transfers: Option<&'d Transfers>) -> Result<Memory<'d>> {
        let bytes = len * dtype.size();
        let Some(transfers) = transfers else {
            return Ok(Memory::Host(Rows { words: vec![0; bytes.div_ceil(8)], bytes, dtype }));
        };
        Ok(Memory::Device { transfers, memory: transfers.space(bytes)?, bytes, dtype })
    }

    fn kind(&self) -> (DType, Device) {
        match self {
            Memory::Host(rows) => (rows.dtype, Device::Cpu),
            Memory::Device { transfers, dtype, .. } => (*dtype, transfers.device()),
        }
    }

    fn data(&mut self) -> *mut u8 {
        match self {
            Memory::Host(rows) => rows.words.as_mut_ptr().cast(),
            Memory::Device { memory, .. } => memory.address() as *mut u8,
        }
    }

    fn tensor(&self, shape: &[usize]) -> Result<Tensor<'_>> {
        let (dtype, device) = self.kind();
        let data = match self {
            Memory::Host(rows) => rows.words.as_ptr().cast(),
            Memory::Device { memory, .. } => memory.address() as *const u8,
        };
        let stride = [shape.get(1).copied().unwrap_or(1), 1];
        // SAFETY: the memory holds the elements of the row-major shape; work on it is waited for
        // before it is freed.
        unsafe { Tensor::from_raw(data, dtype, device, shape, &stride[2 - shape.len()..]) }
    }

    fn tensor_mut(&mut self, shape: &[usize]) -> Result<TensorMut<'_>> {
        let (data, (dtype, device)) = (self.data(), self.kind());
        let stride = [shape.get(1).copied().unwrap_or(1), 1];
        // SAFETY: as above, and borrowed alone.
        unsafe { TensorMut::from_raw(data, dtype, device, shape, &stride[2 - shape.len()..]) }
    }

    /// The aligned part of memory that is longer by [`WORKSPACE_ALIGN`].
    fn scratch(&mut self, needed: usize) -> Scratch<'_> {
        let data = self.data();
        let skip = data.addr().next_multiple_of(WORKSPACE_ALIGN) - data.addr();
        // SAFETY: within the memory, borrowed alone.
        unsafe { Scratch::from_raw(data.wrapping_add(skip), needed) }
    }

    /// On the host, when the work is done.
    fn fetch(self) -> Result<Rows> {
        match self {
            Memory::Host(rows) => Ok(rows),
            Memory::Device { transfers, memory, bytes, dtype } => {
                let mut rows = Rows { words: vec![0; bytes.div_ceil(8)], bytes, dtype };
                transfers.download(&memory, rows.bytes_mut())?;
                Ok(rows)
            }
        }
    }
}

/// Rows of an array in memory that is aligned for any element.
struct Rows {
    words: Vec<u64>,
    bytes: usize,
    dtype: DType,
}

impl Rows {
    fn read(array: &Array, start: usize, count: usize) -> Result<Rows> {
        let row = array.shape()[1..].iter().product::<usize>() * array.dtype().size();
        let bytes = count * row;
        let mut rows = Rows { words: vec![0; bytes.div_ceil(8)], bytes, dtype: array.dtype() };
        array.read_bytes(start * row, rows.bytes_mut())?;
        Ok(rows)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: words are plain bytes, at least `bytes` of them.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.bytes) }
    }

    fn as_bytes(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes) }
    }

    fn to_f64(&self) -> Vec<f64> {
        self.words.iter().map(|word| f64::from_bits(*word)).collect()
    }

    /// Attention masks are often 64-bit integers; the calls take bytes.
    fn mask(self) -> Rows {
        if self.dtype != DType::I64 {
            return self;
        }
        let bytes = self.words.len();
        let mut mask = Rows { words: vec![0; bytes.div_ceil(8)], bytes, dtype: DType::U8 };
        for (to, from) in mask.bytes_mut().iter_mut().zip(&self.words) {
            *to = (*from != 0) as u8;
        }
        mask
    }
}

/// Where everything stands in the output file.
struct Layout {
    header: Vec<u8>,
    /// latents, reference, grad_hidden
    per_token: [Place; 3],
    /// loss_sum, token_count, latent_loss
    totals: [u64; 3],
}

struct Place {
    at: u64,
    row_bytes: u64,
}

impl Place {
    fn row(&self, t: usize) -> u64 {
        self.at + t as u64 * self.row_bytes
    }
}

impl Layout {
    fn new(plan: &Plan, tokens: usize) -> Result<Layout> {
        let (d, k) = (plan.d_in(), plan.num_latents());
        let entry = |name, dtype, shape| TensorEntry { name, dtype, shape };
        let tensors = [
            entry("loss_sum", DType::F64, vec![1]),
            entry("token_count", DType::F64, vec![1]),
            entry("latent_loss", DType::F64, vec![k]),
            entry("latents", DType::F32, vec![tokens, k]),
            entry("reference", DType::F32, vec![tokens, k]),
            entry("grad_hidden", DType::F32, vec![tokens, d]),
        ];
        let mut about = Map::new();
        about.insert("identity".into(), plan.identity().into());
        about.insert("numerics".into(), plan.numerics().into());
        about.insert("activation".into(), plan.activation().name().into());
        let header = safetensors_header(about, &tensors)?;
        let mut starts = [header.len() as u64; 6];
        for i in 1..6 {
            starts[i] = starts[i - 1] + tensors[i - 1].bytes()?;
        }
        let place = |i: usize, row: usize| Place { at: starts[i], row_bytes: row as u64 * 4 };
        Ok(Layout {
            header,
            totals: [starts[0], starts[1], starts[2]],
            per_token: [place(3, k), place(4, k), place(5, d)],
        })
    }
}
