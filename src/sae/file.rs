//! Reading a file at offsets. Nothing stays mapped: a file that shrinks under us is an error, and
//! SIGBUS only in the instant in which a window of it is mapped.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, bail};

/// An open file that is only read. It stays the same file when its name is given to another.
pub(crate) struct DataFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl DataFile {
    pub fn open(path: &Path) -> Result<DataFile> {
        // Asked before opening: opening a FIFO would wait for its writer.
        let kind = std::fs::metadata(path).map_err(|e| Error::io(path, "open the file", &e))?;
        if !kind.is_file() {
            bail!(Io, "{}: not a regular file; give the SAE's file or folder", path.display());
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open the file", &e))?;
        let len = file.metadata().map_err(|e| Error::io(path, "read its size", &e))?.len();
        Ok(DataFile { path: path.to_path_buf(), file, len })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills the buffer from the offset on.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match read_exact_at(&self.file, buf, offset) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => bail!(
                Io,
                "{}: the file became shorter while it was open; write it again and reopen it",
                self.path.display()
            ),
            Err(e) => Err(Error::io(&self.path, "read the file", &e)),
        }
    }

    /// Fills the buffer if the page cache holds all of it; never waits for the disk.
    pub fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> bool {
        platform::read_cached_at(&self.file, buf, offset)
    }

    /// Maps a range of the file, brings it in, hands its first byte to `pick` and unmaps it; false,
    /// and `pick` not called, where that cannot be done.
    pub fn map(&self, offset: u64, len: usize, pick: &mut dyn FnMut(*const u8)) -> bool {
        platform::map(&self.file, offset, len, pick)
    }

    /// Tells the system that this range will be read from front to back.
    pub fn will_stream(&self, offset: u64, len: u64) {
        platform::advise(&self.file, offset, len, platform::Advice::Sequential);
    }

    /// Starts to bring this range into the page cache.
    pub fn will_need(&self, offset: u64, len: u64) {
        platform::advise(&self.file, offset, len, platform::Advice::WillNeed);
    }
}

/// A whole file of text, of which no more than `limit` bytes are ever in memory.
pub(crate) fn read_small(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let fail = |e: &io::Error| Error::io(path, "read the file", e);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| fail(&e))?;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| fail(&e))?;
    if bytes.len() > limit {
        bail!(Format, "{}: larger than {limit} bytes, the most that is read", path.display());
    }
    Ok(bytes)
}

#[cfg(unix)]
fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buf.is_empty() {
        match file.seek_read(buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod platform {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    pub enum Advice {
        Sequential,
        WillNeed,
    }

    pub fn read_cached_at(file: &File, buf: &mut [u8], offset: u64) -> bool {
        let Ok(offset) = libc::off_t::try_from(offset) else { return false };
        let part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: one vector over a live, writable buffer; the kernel writes at most its length.
        let n = unsafe { libc::preadv2(file.as_raw_fd(), &part, 1, offset, libc::RWF_NOWAIT) };
        usize::try_from(n) == Ok(buf.len())
    }

    /// A page size that every Linux mapping offset may be a multiple of.
    const ALIGN: u64 = 1 << 16;

    pub fn map(file: &File, offset: u64, len: usize, pick: &mut dyn FnMut(*const u8)) -> bool {
        let skip = (offset % ALIGN) as usize;
        let (Ok(start), Some(len)) = ((offset - skip as u64).try_into(), len.checked_add(skip))
        else {
            return false;
        };
        let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: a new mapping of a file that is open for reading.
        let map =
            unsafe { libc::mmap(std::ptr::null_mut(), len, read, shared, file.as_raw_fd(), start) };
        if map == libc::MAP_FAILED {
            return false;
        }
        // It fails, where touching would raise SIGBUS, if the file ends before the range does.
        // SAFETY: the mapping is ours.
        let present = unsafe { libc::madvise(map, len, libc::MADV_POPULATE_READ) } == 0;
        if present {
            pick(map.cast::<u8>().cast_const().wrapping_add(skip));
        }
        // SAFETY: mapped above; `pick` keeps no pointer.
        unsafe { libc::munmap(map, len) };
        present
    }

    pub fn advise(file: &File, offset: u64, len: u64, advice: Advice) {
        let advice = match advice {
            Advice::Sequential => libc::POSIX_FADV_SEQUENTIAL,
            Advice::WillNeed => libc::POSIX_FADV_WILLNEED,
        };
        let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else { return };
        // SAFETY: takes no pointers. A hint: its failure changes nothing but speed.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, len, advice) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")))]
mod platform {
    use std::fs::File;

    pub enum Advice {
        Sequential,
        WillNeed,
    }

    pub fn read_cached_at(_: &File, _: &mut [u8], _: u64) -> bool {
        false
    }

    pub fn map(_: &File, _: u64, _: usize, _: &mut dyn FnMut(*const u8)) -> bool {
        false
    }

    pub fn advise(_: &File, _: u64, _: u64, _: Advice) {}
}
