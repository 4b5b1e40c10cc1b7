//! Arrays of a checkpoint, in a file or in memory, read in parts and in their own element type.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result, Status, bail};
use crate::tensor::DType;

use super::file::DataFile;

/// Bytes per read when a matrix is streamed.
const BLOCK: usize = 4 << 20;
/// Wanted elements of one row that lie closer than this are read together.
const MERGE_BYTES: u64 = 1 << 10;
/// A small read from the page cache takes as long as streaming about this many bytes.
const SMALL_READ_BYTES: u64 = 3 << 10;
/// Adjoining columns at least this wide are read as they are, from the disk if need be.
const BAND_BYTES: usize = 8 << 10;

/// A row-major array of a known element type.
pub(crate) struct Array {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    place: Place,
}

enum Place {
    /// The whole array lies within the file; checked when its header was read.
    File {
        file: Arc<DataFile>,
        offset: u64,
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
        let place = Place::File { file, offset };
        Array { name: name.to_string(), dtype, shape: shape.to_vec(), place }
    }

    /// `bytes` are the elements of the whole shape.
    pub fn in_memory(name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Array {
        let place = Place::Memory(bytes);
        Array { name: name.to_string(), dtype, shape: shape.to_vec(), place }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How messages name it: the file, if it has one, and the tensor.
    pub fn label(&self) -> String {
        match &self.place {
            Place::File { file, .. } => format!("{}: tensor {}", file.path().display(), self.name),
            Place::Memory(_) => format!("tensor {}", self.name),
        }
    }

    pub fn file(&self) -> Option<&Arc<DataFile>> {
        match &self.place {
            Place::File { file, .. } => Some(file),
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
        Ok(self.bytes()?.chunks_exact(self.dtype.size()).map(|c| number(self.dtype, c)).collect())
    }

    /// Chosen elements of a vector; they must be finite.
    pub fn pick(&self, at: &[usize]) -> Result<Vec<f64>> {
        let (bytes, size) = (self.bytes()?, self.dtype.size());
        let value = |i: usize| number(self.dtype, &bytes[i * size..][..size]);
        at.iter().map(|i| self.finite(value(*i), || format!("[{i}]"))).collect()
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

    /// Fills `to` with the array's bytes from `start` on.
    pub fn read_bytes(&self, start: usize, to: &mut [u8]) -> Result<()> {
        match &self.place {
            Place::File { file, offset } => file.read_at(to, offset + start as u64),
            Place::Memory(bytes) => {
                to.copy_from_slice(&bytes[start..][..to.len()]);
                Ok(())
            }
        }
    }

    /// The whole array, in its own element type.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let count = self.shape.iter().product::<usize>() * self.dtype.size();
        match &self.place {
            Place::File { file, offset } => {
                let mut bytes = zeroed(count, file.path())?;
                file.read_at(&mut bytes, *offset)?;
                Ok(bytes)
            }
            Place::Memory(bytes) => Ok(bytes.clone()),
        }
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
        match &self.array.place {
            Place::Memory(bytes) => {
                let mut out = zeroed(total, Path::new(&self.array.name))?;
                self.gather_memory(bytes, latents, &mut out);
                Ok(out)
            }
            Place::File { file, offset } => {
                let mut out = zeroed(total, file.path())?;
                match self.layout {
                    Layout::LatentMajor => read_rows(file, *offset, row, latents, &mut out)?,
                    Layout::InputMajor => self.read_columns(file, *offset, latents, &mut out)?,
                }
                Ok(out)
            }
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

    fn gather_memory(&self, bytes: &[u8], latents: &[usize], out: &mut [u8]) {
        let (size, inputs) = (self.array.dtype.size(), self.inputs());
        for (latent, row) in latents.iter().zip(out.chunks_exact_mut(inputs * size)) {
            match self.layout {
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

    /// Columns of an input-major matrix: in small reads while the page cache has them, else by one
    /// pass over what is left of the matrix. Nothing but the result stays in memory.
    fn read_columns(
        &self,
        file: &DataFile,
        offset: u64,
        latents: &[usize],
        out: &mut [u8],
    ) -> Result<()> {
        let columns = Columns::new(latents, self.latents(), self.inputs(), self.array.dtype.size());
        let done = if columns.is_band() {
            columns.read_runs(out, |buffer, position| {
                let at = offset + position;
                file.will_need(at + columns.position(1, 0), buffer.len() as u64);
                file.read_at(buffer, at).map(|()| true)
            })?
        } else if columns.few() {
            columns.read_runs(out, |buffer, at| Ok(file.read_cached_at(buffer, offset + at)))?
        } else {
            0
        };
        columns.stream(file, offset, done, out)
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

/// A request for columns of a row-major [rows, width] matrix.
struct Columns {
    /// (column, position among the wanted), by column.
    wanted: Vec<(usize, usize)>,
    /// Ranges of `wanted` that one small read serves.
    runs: Vec<std::ops::Range<usize>>,
    rows: usize,
    width: usize,
    size: usize,
}

impl Columns {
    fn new(columns: &[usize], width: usize, rows: usize, size: usize) -> Columns {
        let mut wanted: Vec<(usize, usize)> = columns.iter().copied().zip(0..).collect();
        wanted.sort_unstable();
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for i in 0..wanted.len() {
            let near = i > 0 && ((wanted[i].0 - wanted[i - 1].0) * size) as u64 <= MERGE_BYTES;
            match runs.last_mut() {
                Some(run) if near => run.end = i + 1,
                _ => runs.push(i..i + 1),
            }
        }
        Columns { wanted, runs, rows, width, size }
    }

    /// One wide block of adjoining columns.
    fn is_band(&self) -> bool {
        self.runs.len() == 1 && self.wanted.len() * self.size >= BAND_BYTES
    }

    /// Few enough that small reads beat one pass.
    fn few(&self) -> bool {
        self.runs.len() as u64 * SMALL_READ_BYTES <= self.width as u64 * self.size as u64
    }

    /// One read per run and row, until `read` declines. Returns how many rows are complete.
    fn read_runs(
        &self,
        out: &mut [u8],
        mut read: impl FnMut(&mut [u8], u64) -> Result<bool>,
    ) -> Result<usize> {
        let mut buffer = Vec::new();
        for row in 0..self.rows {
            for run in &self.runs {
                let (first, last) = (self.wanted[run.start].0, self.wanted[run.end - 1].0);
                buffer.resize((last - first + 1) * self.size, 0);
                if !read(&mut buffer, self.position(row, first))? {
                    return Ok(row);
                }
                for (column, slot) in &self.wanted[run.clone()] {
                    let at = (column - first) * self.size;
                    self.put(out, *slot, row, &buffer[at..at + self.size]);
                }
            }
        }
        Ok(self.rows)
    }

    /// One pass over the rows from `row` on, through a buffer of fixed size.
    fn stream(&self, file: &DataFile, offset: u64, row: usize, out: &mut [u8]) -> Result<()> {
        if row == self.rows || self.wanted.is_empty() {
            return Ok(());
        }
        let end = self.position(self.rows, 0);
        let mut start = self.position(row, 0);
        file.will_stream(offset + start, end - start);
        let mut buffer = zeroed(BLOCK.min((end - start) as usize), file.path())?;
        let mut filled = 0;
        for row in row..self.rows {
            for (column, slot) in &self.wanted {
                let position = self.position(row, *column);
                while position >= start + filled as u64 {
                    start += filled as u64;
                    filled = (end - start).min(BLOCK as u64) as usize;
                    file.read_at(&mut buffer[..filled], offset + start)?;
                    // The next block travels from the disk while this one is picked apart.
                    file.will_need(offset + start + filled as u64, BLOCK as u64);
                }
                let at = (position - start) as usize;
                self.put(out, *slot, row, &buffer[at..at + self.size]);
            }
        }
        Ok(())
    }

    /// Byte position of an element in the matrix.
    fn position(&self, row: usize, column: usize) -> u64 {
        (row as u64 * self.width as u64 + column as u64) * self.size as u64
    }

    fn put(&self, out: &mut [u8], slot: usize, row: usize, element: &[u8]) {
        out[(slot * self.rows + row) * self.size..][..self.size].copy_from_slice(element);
    }
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
fn zeroed(len: usize, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if bytes.try_reserve_exact(len).is_err() {
        bail!(Io, "{}: {len} bytes of it do not fit into memory", path.display());
    }
    bytes.resize(len, 0);
    Ok(bytes)
}
