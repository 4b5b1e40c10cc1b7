//! Columns of a matrix in a file: a strided gather that leaves nothing else in memory.

use std::ops::Range;
use std::thread;

use crate::error::{Error, Result, Status};

use super::array::zeroed;
use super::file::DataFile;

/// Bytes per read when a matrix is streamed.
const BLOCK: usize = 4 << 20;
/// Bytes that are mapped at a time: few, since a file that shrinks in that moment raises SIGBUS.
const WINDOW: usize = 8 << 20;
/// Elements that are looked for in the page cache before a window is mapped.
const PROBES: usize = 8;
/// Wanted elements of one row that lie closer than this are read together.
const MERGE_BYTES: usize = 1 << 10;
/// A small read from the page cache takes as long as streaming about this many bytes.
const SMALL_READ_BYTES: usize = 3 << 10;
/// Adjoining columns at least this wide are read as they are, from the disk if need be.
const BAND_BYTES: usize = 8 << 10;
/// A matrix at least this large is read by two threads, which end before the call does.
const TWO_READERS_BYTES: u64 = 64 << 20;

/// A request for columns of a row-major [rows, width] matrix.
pub(super) struct Columns<'a> {
    file: &'a DataFile,
    /// Where the matrix begins in the file.
    offset: u64,
    rows: usize,
    width: usize,
    /// Bytes per element.
    size: usize,
    /// (column, position among the wanted), by column.
    wanted: Vec<(usize, usize)>,
    /// Ranges of `wanted` that one small read serves.
    runs: Vec<Range<usize>>,
}

/// Some rows of the matrix, and where their elements go: one slice per wanted column.
struct Part<'a> {
    rows: Range<usize>,
    out: Vec<&'a mut [u8]>,
}

impl<'a> Columns<'a> {
    /// The matrix of [rows, width] elements of `size` bytes lies within the file.
    pub fn new(
        file: &'a DataFile,
        offset: u64,
        [rows, width]: [usize; 2],
        size: usize,
        columns: &[usize],
    ) -> Columns<'a> {
        let mut wanted: Vec<(usize, usize)> = columns.iter().copied().zip(0..).collect();
        wanted.sort_unstable();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for i in 0..wanted.len() {
            let near = i > 0 && (wanted[i].0 - wanted[i - 1].0) * size <= MERGE_BYTES;
            match runs.last_mut() {
                Some(run) if near => run.end = i + 1,
                _ => runs.push(i..i + 1),
            }
        }
        Columns { file, offset, rows, width, size, wanted, runs }
    }

    /// Fills `out` with the columns one after the other, in the order of the request.
    pub fn read(&self, out: &mut [u8]) -> Result<()> {
        if self.wanted.is_empty() {
            return Ok(());
        }
        let large = self.position(self.rows, 0) >= TWO_READERS_BYTES;
        let middle = if large { self.rows / 2 } else { self.rows };
        let mut first = Part { rows: 0..middle, out: Vec::new() };
        let mut second = Part { rows: middle..self.rows, out: Vec::new() };
        for column in out.chunks_exact_mut(self.rows * self.size) {
            let (upper, lower) = column.split_at_mut(middle * self.size);
            first.out.push(upper);
            second.out.push(lower);
        }
        if second.rows.is_empty() {
            return self.fill(first);
        }
        thread::scope(|scope| {
            let helper = thread::Builder::new().spawn_scoped(scope, || self.fill(second));
            let helper = helper.map_err(|e| {
                let text = format!("{}: cannot start a reader: {e}", self.file.path().display());
                Error::new(Status::Io, text)
            })?;
            let ours = self.fill(first);
            match helper.join() {
                Ok(theirs) => ours.and(theirs),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Windows and small reads while the page cache has what they want; ever longer passes where it
    /// has not.
    fn fill(&self, mut part: Part<'_>) -> Result<()> {
        let row_bytes = self.width * self.size;
        if self.runs.len() == 1 && self.wanted.len() * self.size >= BAND_BYTES {
            return self.read_runs(&mut part, |buffer, at| {
                self.file.will_need(at + row_bytes as u64, buffer.len() as u64);
                self.file.read_at(buffer, at).map(|()| true)
            });
        }
        if self.runs.len() * SMALL_READ_BYTES > row_bytes {
            return self.stream(&mut part, self.rows);
        }
        let mut pass = (BLOCK / row_bytes).max(1);
        while !part.rows.is_empty() {
            self.read_windows(&mut part);
            self.read_runs(&mut part, |buffer, at| Ok(self.file.read_cached_at(buffer, at)))?;
            self.stream(&mut part, pass)?;
            pass = pass.saturating_mul(2);
        }
        Ok(())
    }

    /// Picks elements out of mapped windows, until one is not in the page cache or cannot be mapped.
    fn read_windows(&self, part: &mut Part<'_>) {
        let step = (WINDOW / (self.width * self.size)).max(1);
        while !part.rows.is_empty() {
            let rows = part.rows.start..part.rows.end.min(part.rows.start + step);
            let (start, end) = (self.position(rows.start, 0), self.position(rows.end, 0));
            let bytes = (end - start) as usize;
            let mut pick = |window: *const u8| {
                // SAFETY: the window holds these rows.
                unsafe {
                    match self.size {
                        2 => self.pick::<2>(part, &rows, window),
                        4 => self.pick::<4>(part, &rows, window),
                        _ => self.pick::<8>(part, &rows, window),
                    }
                }
            };
            if !self.is_cached(&rows) || !self.file.map(self.offset + start, bytes, &mut pick) {
                return;
            }
            part.drop_rows_before(rows.end, self.size);
        }
    }

    /// Copies the wanted elements of S bytes out of a window that begins with the first row.
    ///
    /// # Safety
    /// `window` must be readable for all of `rows`.
    unsafe fn pick<const S: usize>(
        &self,
        part: &mut Part<'_>,
        rows: &Range<usize>,
        window: *const u8,
    ) {
        let first = rows.start - part.rows.start;
        for (column, slot) in &self.wanted {
            let out = part.out[*slot].as_chunks_mut::<S>().0;
            for (i, to) in out[first..first + rows.len()].iter_mut().enumerate() {
                let at = (i * self.width + column) * S;
                // SAFETY: the element lies within the window.
                *to = unsafe { window.add(at).cast::<[u8; S]>().read_unaligned() };
            }
        }
    }

    /// A sample of the wanted elements of these rows is in the page cache.
    fn is_cached(&self, rows: &Range<usize>) -> bool {
        let mut element = [0; size_of::<f64>()];
        (0..PROBES).all(|i| {
            let row = rows.start + i * (rows.len() - 1) / (PROBES - 1);
            let column = self.wanted[i * (self.wanted.len() - 1) / (PROBES - 1)].0;
            let at = self.offset + self.position(row, column);
            self.file.read_cached_at(&mut element[..self.size], at)
        })
    }

    /// One read per run and row, until `read` declines. The part keeps the rows that are left.
    fn read_runs(
        &self,
        part: &mut Part<'_>,
        mut read: impl FnMut(&mut [u8], u64) -> Result<bool>,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        for row in part.rows.clone() {
            for run in &self.runs {
                let (first, last) = (self.wanted[run.start].0, self.wanted[run.end - 1].0);
                buffer.resize((last - first + 1) * self.size, 0);
                if !read(&mut buffer, self.offset + self.position(row, first))? {
                    part.drop_rows_before(row, self.size);
                    return Ok(());
                }
                for (column, slot) in &self.wanted[run.clone()] {
                    part.put(*slot, row, &buffer[(column - first) * self.size..][..self.size]);
                }
            }
        }
        part.drop_rows_before(part.rows.end, self.size);
        Ok(())
    }

    /// One pass over at most so many rows, through a buffer of fixed size.
    fn stream(&self, part: &mut Part<'_>, rows: usize) -> Result<()> {
        let rows = part.rows.start..part.rows.end.min(part.rows.start.saturating_add(rows));
        if rows.is_empty() {
            return Ok(());
        }
        let end = self.position(rows.end, 0);
        let mut start = self.position(rows.start, 0);
        self.file.will_stream(self.offset + start, end - start);
        let mut buffer = zeroed(BLOCK.min((end - start) as usize), self.file.path())?;
        let mut filled = 0;
        for row in rows.clone() {
            for (column, slot) in &self.wanted {
                let position = self.position(row, *column);
                while position >= start + filled as u64 {
                    start += filled as u64;
                    filled = (end - start).min(BLOCK as u64) as usize;
                    self.file.read_at(&mut buffer[..filled], self.offset + start)?;
                }
                part.put(*slot, row, &buffer[(position - start) as usize..][..self.size]);
            }
        }
        part.drop_rows_before(rows.end, self.size);
        Ok(())
    }

    /// Byte position of an element in the matrix.
    fn position(&self, row: usize, column: usize) -> u64 {
        (row as u64 * self.width as u64 + column as u64) * self.size as u64
    }
}

impl Part<'_> {
    fn put(&mut self, slot: usize, row: usize, element: &[u8]) {
        let at = (row - self.rows.start) * element.len();
        self.out[slot][at..at + element.len()].copy_from_slice(element);
    }

    fn drop_rows_before(&mut self, row: usize, size: usize) {
        for column in &mut self.out {
            let all = std::mem::take(column);
            *column = &mut all[(row - self.rows.start) * size..];
        }
        self.rows.start = row;
    }
}
