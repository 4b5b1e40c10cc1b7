//! Arrays of a checkpoint, in a file or in memory, read in parts and in their own element type.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result, Status, bail};
use crate::tensor::DType;

use super::columns::Columns;
use super::container::MemberReader;
use super::file::DataFile;

/// Bytes of a vector that are in memory at a time; whole elements of every type.
const BLOCK: usize = 64 << 10;

/// A row-major array of a known element type.
pub(crate) struct Array {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    /// The bytes are those of the transpose.
    turned: bool,
    place: Place,
}

enum Place {
    /// The whole array lies within the file; checked when its header was read.
    File {
        file: Arc<DataFile>,
        offset: u64,
    },
    /// A deflated stream of a file, whose first `skip` inflated bytes are a header.
    Deflated {
        file: Arc<DataFile>,
        start: u64,
        stored_len: u64,
        skip: u64,
    },
    Memory(Vec<u8>),
}

impl Array {
    pub fn in_file(
        name: &str,
        dtype: DType,
        shape: &[usize],
        file: Arc<DataFile>,
        offset: u64,
    ) -> Array {
        Array::new(name, dtype, shape, Place::File { file, offset })
    }

    /// `place` is where the stream begins, how many bytes it has, and how many inflated ones come
    /// before the elements.
    pub fn deflated(
        name: &str,
        dtype: DType,
        shape: &[usize],
        file: Arc<DataFile>,
        [start, stored_len, skip]: [u64; 3],
    ) -> Array {
        Array::new(name, dtype, shape, Place::Deflated { file, start, stored_len, skip })
    }

    /// `bytes` are the elements of the whole shape.
    pub fn in_memory(name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Array {
        Array::new(name, dtype, shape, Place::Memory(bytes))
    }

    fn new(name: &str, dtype: DType, shape: &[usize], place: Place) -> Array {
        Array { name: name.to_string(), dtype, shape: shape.to_vec(), turned: false, place }
    }

    /// The same, of a matrix whose bytes are those of the transpose.
    pub fn turned(self, turned: bool) -> Array {
        Array { turned, ..self }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How messages name it: the file, if it has one, and the tensor.
    pub fn label(&self) -> String {
        match self.file() {
            Some(file) => format!("{}: tensor {}", file.path().display(), self.name),
            None => format!("tensor {}", self.name),
        }
    }

    pub fn file(&self) -> Option<&Arc<DataFile>> {
        match &self.place {
            Place::File { file, .. } | Place::Deflated { file, .. } => Some(file),
            Place::Memory(_) => None,
        }
    }

    /// An error about this array's shape or type: the file's fault, or the caller's.
    pub fn fault(&self, caller: Status, text: String) -> Error {
        let status = if self.file().is_some() { Status::Format } else { caller };
        Error::new(status, format!("{} {text}", self.label()))
    }

    pub fn expect_shape(&self, expected: &[usize], meaning: &str) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        let text = format!("has the shape {:?}; expected {expected:?} ({meaning})", self.shape);
        Err(self.fault(Status::Shape, text))
    }

    pub fn expect_float(&self) -> Result<()> {
        match self.dtype {
            DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(()),
            other => {
                let text = format!(
                    "holds {} numbers; convert it to float32, float16, bfloat16 or float64",
                    other.name()
                );
                Err(self.fault(Status::Dtype, text))
            }
        }
    }

    /// Every element of a vector, exactly.
    pub fn vector(&self) -> Result<Vec<f64>> {
        let count = self.shape.iter().product();
        let mut all = Vec::new();
        if all.try_reserve_exact(count).is_err() {
            bail!(Io, "{}: its {count} numbers do not fit into memory", self.label());
        }
        self.visit(|_, value| {
            all.push(value);
            Ok(())
        })?;
        Ok(all)
    }

    /// Hands on every element of a vector with its place, from the first on.
    pub fn visit(&self, mut each: impl FnMut(usize, f64) -> Result<()>) -> Result<()> {
        self.expect_row_major()?;
        let size = self.dtype.size();
        let total = self.shape.iter().product::<usize>() * size;
        let mut stream = match &self.place {
            Place::Deflated { .. } => Some(self.stream(0)?),
            _ => None,
        };
        let mut buffer = vec![0; BLOCK.min(total)];
        for start in (0..total).step_by(BLOCK) {
            let part = &mut buffer[..BLOCK.min(total - start)];
            match &mut stream {
                Some(stream) => stream.fill(part)?,
                None => self.read_bytes(start, part)?,
            }
            for (i, element) in part.chunks_exact(size).enumerate() {
                each(start / size + i, number(self.dtype, element))?;
            }
        }
        Ok(())
    }

    /// Chosen elements of a vector; they must be finite.
    pub fn pick(&self, at: &[usize]) -> Result<Vec<f64>> {
        let mut order: Vec<(usize, usize)> = at.iter().copied().zip(0..).collect();
        order.sort_unstable();
        let mut wanted = order.into_iter().peekable();
        let mut picked = vec![f64::NAN; at.len()];
        self.visit(|i, value| {
            while let Some((_, slot)) = wanted.next_if(|(place, _)| *place == i) {
                picked[slot] = value;
            }
            Ok(())
        })?;
        at.iter().zip(picked).map(|(i, v)| self.finite(v, || format!("[{i}]"))).collect()
    }

    /// Chosen elements of a vector, in its own element type.
    pub fn gather(&self, at: &[usize]) -> Result<Vec<u8>> {
        let (bytes, size) = (self.bytes()?, self.dtype.size());
        Ok(at.iter().flat_map(|i| &bytes[i * size..][..size]).copied().collect())
    }

    /// Every element of a vector of 64-bit integers.
    pub fn integers(&self) -> Result<Vec<i64>> {
        if self.dtype != DType::I64 {
            let text = format!("holds {} numbers; it must hold int64", self.dtype.name());
            return Err(self.fault(Status::Dtype, text));
        }
        let bytes = self.bytes()?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect())
    }

    /// Passes a number on, or names the element that is not one.
    pub fn finite(&self, value: f64, place: impl Fn() -> String) -> Result<f64> {
        if value.is_finite() {
            return Ok(value);
        }
        bail!(
            NonFinite,
            "{}{} is {value}; the checkpoint is damaged or was saved after training diverged: \
             use another one, or drop this latent",
            self.label(),
            place()
        )
    }

    /// Looks at every element.
    pub fn expect_finite(&self) -> Result<()> {
        let Place::Memory(bytes) = &self.place else { return Ok(()) };
        for (i, element) in bytes.chunks_exact(self.dtype.size()).enumerate() {
            self.finite(number(self.dtype, element), || format!(" at element {i}"))?;
        }
        Ok(())
    }

    /// Fills `to` with the array's bytes from `start` on; not of a matrix that lies transposed.
    pub fn read_bytes(&self, start: usize, to: &mut [u8]) -> Result<()> {
        self.expect_row_major()?;
        match &self.place {
            Place::File { file, offset } => file.read_at(to, offset + start as u64),
            Place::Deflated { .. } => self.stream(start as u64)?.fill(to),
            Place::Memory(bytes) => {
                to.copy_from_slice(&bytes[start..][..to.len()]);
                Ok(())
            }
        }
    }

    fn expect_row_major(&self) -> Result<()> {
        match self.turned {
            false => Ok(()),
            true => {
                let text = "is stored column by column; save it row-major".to_string();
                Err(self.fault(Status::Layout, text))
            }
        }
    }

    /// The whole array, in its own element type; not of a matrix that lies transposed.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        if let Place::Memory(bytes) = &self.place {
            return Ok(bytes.clone());
        }
        let count = self.shape.iter().product::<usize>() * self.dtype.size();
        let mut bytes = zeroed(count, Path::new(&self.label()))?;
        self.read_bytes(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The elements of a deflated array as a stream, from this byte on.
    fn stream(&self, from: u64) -> Result<MemberReader> {
        let Place::Deflated { file, start, stored_len, skip } = &self.place else {
            bail!(Internal, "{} is not deflated", self.label());
        };
        let mut reader = MemberReader::new(file, *start, *stored_len, true, &self.name);
        reader.skip(skip + from)?;
        Ok(reader)
    }
}

/// A 2-D array of which one axis counts latents and the other inputs.
pub(super) struct Matrix {
    array: Array,
    layout: Layout,
}

/// Which way a matrix lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [d_sae, d_in]: one contiguous row per latent.
    LatentMajor,
    /// [d_in, d_sae]: as `W_enc` of SAELens.
    InputMajor,
}

impl Layout {
    pub fn name(self) -> &'static str {
        match self {
            Layout::LatentMajor => "latent_major",
            Layout::InputMajor => "input_major",
        }
    }

    pub fn from_name(name: &str) -> Option<Layout> {
        [Layout::LatentMajor, Layout::InputMajor].into_iter().find(|l| l.name() == name)
    }

    pub(super) fn shape(self, latents: usize, inputs: usize) -> [usize; 2] {
        match self {
            Layout::LatentMajor => [latents, inputs],
            Layout::InputMajor => [inputs, latents],
        }
    }
}

impl Matrix {
    /// The array must have two dimensions.
    pub fn new(array: Array, layout: Layout) -> Matrix {
        Matrix { array, layout }
    }

    pub fn array(&self) -> &Array {
        &self.array
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn latents(&self) -> usize {
        self.array.shape[if self.layout == Layout::LatentMajor { 0 } else { 1 }]
    }

    pub fn inputs(&self) -> usize {
        self.array.shape[if self.layout == Layout::LatentMajor { 1 } else { 0 }]
    }

    /// The rows of chosen latents, [latents.len(), inputs], in the array's own element type.
    pub fn gather(&self, latents: &[usize]) -> Result<Vec<u8>> {
        let size = self.array.dtype.size();
        let row = self.inputs() * size;
        let Some(total) = row.checked_mul(latents.len()) else {
            bail!(InvalidArgument, "{} latents do not fit into memory", latents.len());
        };
        let mut out = zeroed(total, Path::new(&self.array.label()))?;
        match (&self.array.place, self.physical()) {
            (Place::Memory(bytes), physical) => {
                self.gather_memory(bytes, physical, latents, &mut out)
            }
            (Place::Deflated { .. }, physical) => {
                self.gather_stream(self.array.stream(0)?, physical, latents, &mut out)?;
            }
            (Place::File { file, offset }, Layout::LatentMajor) => {
                read_rows(file, *offset, row, latents, &mut out)?;
            }
            (Place::File { file, offset }, Layout::InputMajor) => {
                let shape = [self.inputs(), self.latents()];
                Columns::new(file, *offset, shape, size, latents).read(&mut out)?;
            }
        }
        Ok(out)
    }

    /// How the bytes lie.
    fn physical(&self) -> Layout {
        match (self.layout, self.array.turned) {
            (layout, false) => layout,
            (Layout::LatentMajor, true) => Layout::InputMajor,
            (Layout::InputMajor, true) => Layout::LatentMajor,
        }
    }

    /// One gathered row as numbers, all finite.
    pub fn decode_row(&self, latent: u64, row: &[u8], out: &mut Vec<f64>) -> Result<()> {
        let dtype = self.array.dtype;
        out.clear();
        out.extend(row.chunks_exact(dtype.size()).map(|c| number(dtype, c)));
        if let Some(i) = out.iter().position(|v| !v.is_finite()) {
            self.array.finite(out[i], || format!(" at latent {latent}, input {i}"))?;
        }
        Ok(())
    }

    fn gather_memory(&self, bytes: &[u8], physical: Layout, latents: &[usize], out: &mut [u8]) {
        let (size, inputs) = (self.array.dtype.size(), self.inputs());
        for (latent, row) in latents.iter().zip(out.chunks_exact_mut(inputs * size)) {
            match physical {
                Layout::LatentMajor => {
                    row.copy_from_slice(&bytes[latent * inputs * size..][..inputs * size]);
                }
                Layout::InputMajor => {
                    for (i, element) in row.chunks_exact_mut(size).enumerate() {
                        let at = (i * self.latents() + latent) * size;
                        element.copy_from_slice(&bytes[at..at + size]);
                    }
                }
            }
        }
    }

    /// From front to back: a stream has no other way.
    fn gather_stream(
        &self,
        mut stream: MemberReader,
        physical: Layout,
        latents: &[usize],
        out: &mut [u8],
    ) -> Result<()> {
        let (size, inputs) = (self.array.dtype.size(), self.inputs());
        let mut order: Vec<(usize, usize)> = latents.iter().copied().zip(0..).collect();
        order.sort_unstable();
        let mut at = 0;
        match physical {
            Layout::LatentMajor => {
                let row = inputs * size;
                for (i, (latent, slot)) in order.iter().enumerate() {
                    if i > 0 && order[i - 1].0 == *latent {
                        out.copy_within(
                            order[i - 1].1 * row..(order[i - 1].1 + 1) * row,
                            slot * row,
                        );
                        continue;
                    }
                    let start = (latent * row) as u64;
                    stream.skip(start - at)?;
                    stream.fill(&mut out[slot * row..][..row])?;
                    at = start + row as u64;
                }
            }
            Layout::InputMajor => {
                for input in 0..inputs {
                    for (i, (latent, slot)) in order.iter().enumerate() {
                        let to = (slot * inputs + input) * size;
                        if i > 0 && order[i - 1].0 == *latent {
                            let from = (order[i - 1].1 * inputs + input) * size;
                            out.copy_within(from..from + size, to);
                            continue;
                        }
                        let start = ((input * self.latents() + latent) * size) as u64;
                        stream.skip(start - at)?;
                        stream.fill(&mut out[to..][..size])?;
                        at = start + size as u64;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Contiguous rows, in the file's order.
fn read_rows(
    file: &DataFile,
    offset: u64,
    row: usize,
    latents: &[usize],
    out: &mut [u8],
) -> Result<()> {
    let at = |latent: usize| offset + latent as u64 * row as u64;
    let mut order: Vec<(usize, usize)> = latents.iter().copied().zip(0..).collect();
    order.sort_unstable();
    // All reads are announced first, so that a cold disk works on them together.
    for (latent, _) in &order {
        file.will_need(at(*latent), row as u64);
    }
    for (latent, slot) in order {
        file.read_at(&mut out[slot * row..][..row], at(latent))?;
    }
    Ok(())
}

/// One element as f64; every type that `expect_float` accepts converts exactly.
fn number(dtype: DType, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]) as f64,
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f64(),
        (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f64(),
        (DType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => f64::NAN,
    }
}

/// A buffer of zeros, or an error where `vec!` would abort.
pub(super) fn zeroed(len: usize, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if bytes.try_reserve_exact(len).is_err() {
        bail!(Io, "{}: {len} bytes of it do not fit into memory", path.display());
    }
    bytes.resize(len, 0);
    Ok(bytes)
}
