//! The directory of a zip archive, zip64 included: which bytes of the file are whose.
//!
//! Members are found through the central directory alone. Everything that it claims is checked
//! before anything is read: members lie inside the file, apart from each other, under one name each.

use std::io::Read;
use std::sync::Arc;

use flate2::Crc;
use flate2::read::DeflateDecoder;

use crate::error::{Error, Result};

use super::super::array::zeroed;
use super::super::file::DataFile;

/// A directory larger than this is not one of a checkpoint.
const DIRECTORY_LIMIT: u64 = 16 << 20;
const END: usize = 22;
const END_LOCATOR: u64 = 20;
const END_64: u64 = 56;
const CENTRAL: usize = 46;
const LOCAL: u64 = 30;

/// One file of an archive.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub name: String,
    /// Where its bytes begin in the archive.
    pub start: u64,
    /// How many they are in the archive, and how many when they are inflated.
    pub stored_len: u64,
    pub len: u64,
    pub deflated: bool,
    crc: u32,
}

/// An archive's members, in the order of the directory.
pub(crate) struct Zip {
    file: Arc<DataFile>,
    members: Vec<Member>,
    /// Places in `members`, by name.
    by_name: Vec<usize>,
}

impl Zip {
    pub fn open(file: Arc<DataFile>) -> Result<Zip> {
        let (at, len, count) = find_directory(&file)?;
        let mut directory = zeroed(len as usize, file.path())?;
        file.read_at(&mut directory, at)?;
        let mut members = Vec::new();
        let mut rest = &directory[..];
        for _ in 0..count {
            let Some((member, left)) = read_entry(&file, rest)? else {
                return Err(broken(&file, "its directory ends in the middle of an entry"));
            };
            members.push(member);
            rest = left;
        }
        let mut by_name: Vec<usize> = (0..members.len()).collect();
        by_name.sort_unstable_by(|a, b| members[*a].name.cmp(&members[*b].name));
        let zip = Zip { file, members, by_name };
        zip.check_apart(at)?;
        Ok(zip)
    }

    pub fn file(&self) -> &Arc<DataFile> {
        &self.file
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    pub fn find(&self, name: &str) -> Option<&Member> {
        let at = self.by_name.binary_search_by(|i| self.members[*i].name.as_str().cmp(name));
        Some(&self.members[self.by_name[at.ok()?]])
    }

    /// A small member, whole; its checksum must hold.
    pub fn read(&self, member: &Member, limit: u64) -> Result<Vec<u8>> {
        let name = &member.name;
        if member.len > limit {
            let text =
                format!("its member {name} has {} bytes, {limit} at most are read", member.len);
            return Err(broken(&self.file, &text));
        }
        let mut bytes = zeroed(member.len as usize, self.file.path())?;
        let mut reader = self.reader(member);
        reader.fill(&mut bytes)?;
        reader.expect_end()?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        if crc.sum() != member.crc {
            return Err(broken(&self.file, &format!("its member {name} fails its checksum")));
        }
        Ok(bytes)
    }

    /// The bytes of a member from the first on, inflated where they are not stored plainly.
    pub fn reader(&self, member: &Member) -> MemberReader {
        MemberReader::new(
            &self.file,
            member.start,
            member.stored_len,
            member.deflated,
            &member.name,
        )
    }

    /// Members may not share bytes with each other or with the directory, and names are unique.
    fn check_apart(&self, directory: u64) -> Result<()> {
        let name = |i: usize| &self.members[i].name;
        if let Some(twice) = self.by_name.windows(2).find(|two| name(two[0]) == name(two[1])) {
            let text = format!("it holds the member {} twice", name(twice[0]));
            return Err(broken(&self.file, &text));
        }
        let mut spans: Vec<(u64, u64, &str)> = self
            .members
            .iter()
            .map(|m| (m.start, m.start + m.stored_len, m.name.as_str()))
            .filter(|(start, end, _)| start < end)
            .collect();
        spans.sort_unstable();
        let overlap = spans.windows(2).find(|pair| pair[0].1 > pair[1].0);
        if let Some([a, b]) = overlap {
            return Err(broken(&self.file, &format!("its members {} and {} overlap", a.2, b.2)));
        }
        if let Some((.., name)) = spans.last().filter(|(_, end, _)| *end > directory) {
            return Err(broken(
                &self.file,
                &format!("its member {name} reaches into the directory"),
            ));
        }
        Ok(())
    }
}

/// Reads a member from front to back.
pub(crate) struct MemberReader {
    source: Source,
    file: Arc<DataFile>,
    name: String,
}

enum Source {
    Plain(FileRange),
    Deflated(Box<DeflateDecoder<FileRange>>),
}

impl MemberReader {
    pub fn new(
        file: &Arc<DataFile>,
        start: u64,
        stored_len: u64,
        deflated: bool,
        name: &str,
    ) -> MemberReader {
        let range = FileRange { file: Arc::clone(file), at: start, end: start + stored_len };
        let source = match deflated {
            true => Source::Deflated(Box::new(DeflateDecoder::new(range))),
            false => Source::Plain(range),
        };
        MemberReader { source, file: Arc::clone(file), name: name.to_string() }
    }

    /// The next bytes, all of them.
    pub fn fill(&mut self, mut to: &mut [u8]) -> Result<()> {
        while !to.is_empty() {
            match self.read(to)? {
                0 => {
                    let text =
                        format!("its member {} is shorter than the directory says", self.name);
                    return Err(broken(&self.file, &text));
                }
                n => to = &mut to[n..],
            }
        }
        Ok(())
    }

    /// Passes over the next bytes.
    pub fn skip(&mut self, mut n: u64) -> Result<()> {
        let mut scratch = [0; 4096];
        while n > 0 {
            let part = scratch.len().min(usize::try_from(n).unwrap_or(usize::MAX));
            self.fill(&mut scratch[..part])?;
            n -= part as u64;
        }
        Ok(())
    }

    pub fn expect_end(&mut self) -> Result<()> {
        if self.read(&mut [0])? != 0 {
            let text = format!("its member {} is longer than the directory says", self.name);
            return Err(broken(&self.file, &text));
        }
        Ok(())
    }

    fn read(&mut self, to: &mut [u8]) -> Result<usize> {
        let read = match &mut self.source {
            Source::Plain(range) => range.read(to),
            Source::Deflated(decoder) => decoder.read(to),
        };
        read.map_err(|e| broken(&self.file, &format!("its member {} is damaged: {e}", self.name)))
    }
}

/// Bytes of a file as a stream.
struct FileRange {
    file: Arc<DataFile>,
    at: u64,
    end: u64,
}

impl Read for FileRange {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let n = to.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        self.file.read_at(&mut to[..n], self.at).map_err(std::io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Where the central directory begins, its bytes, its entries.
fn find_directory(file: &DataFile) -> Result<(u64, u64, u64)> {
    let tail_len = file.len().min((END + u16::MAX as usize) as u64);
    let tail_at = file.len() - tail_len;
    let mut tail = vec![0; tail_len as usize];
    file.read_at(&mut tail, tail_at)?;
    // The last signature whose comment fills the rest of the file.
    let found = (0..=tail.len().saturating_sub(END)).rev().find(|at| {
        let end = &tail[*at..];
        end.starts_with(b"PK\x05\x06")
            && u16_at(end, 20).is_some_and(|n| END + n as usize == end.len())
    });
    let Some(at) = found else {
        return Err(broken(file, "it has no end of directory; it is truncated: fetch it again"));
    };
    let end = &tail[at..];
    let (disk, first_disk) = (u16_at(end, 4), u16_at(end, 6));
    let count = u16_at(end, 10).unwrap_or(0) as u64;
    let (len, start) = (u32_at(end, 12).unwrap_or(0) as u64, u32_at(end, 16).unwrap_or(0) as u64);
    let end_at = tail_at + at as u64;
    let located = match end_at.checked_sub(END_LOCATOR) {
        Some(at) => {
            let mut locator = [0; END_LOCATOR as usize];
            file.read_at(&mut locator, at)?;
            locator.starts_with(b"PK\x06\x07").then(|| u64_at(&locator, 8)).flatten()
        }
        None => None,
    };
    let (start, len, count, limit) = match located {
        Some(at) => read_end_64(file, at, end_at)?,
        None if disk != Some(0) || first_disk != Some(0) => {
            return Err(broken(file, "it is one of several volumes"));
        }
        None => (start, len, count, end_at),
    };
    if len > DIRECTORY_LIMIT || start.checked_add(len).is_none_or(|end| end > limit) {
        return Err(broken(file, "its directory lies outside of the file, or is too large"));
    }
    if count > len / CENTRAL as u64 {
        return Err(broken(file, "its directory is too short for its entries"));
    }
    Ok((start, len, count))
}

/// The zip64 end record: directory start, bytes, entries, and where the directory must have ended.
fn read_end_64(file: &DataFile, at: u64, limit: u64) -> Result<(u64, u64, u64, u64)> {
    let fits = at.checked_add(END_64).is_some_and(|end| end <= limit);
    let mut record = [0; END_64 as usize];
    if fits {
        file.read_at(&mut record, at)?;
    }
    let field = |at| u64_at(&record, at).unwrap_or(0);
    let one_volume = u32_at(&record, 16) == Some(0) && u32_at(&record, 20) == Some(0);
    if !record.starts_with(b"PK\x06\x06") || !one_volume {
        return Err(broken(file, "its zip64 end of directory is not where it should be"));
    }
    Ok((field(48), field(40), field(32), at))
}

/// An entry of the directory and what follows it; none where it is cut off.
fn read_entry<'a>(file: &DataFile, entry: &'a [u8]) -> Result<Option<(Member, &'a [u8])>> {
    let lengths = [28, 30, 32].map(|at| u16_at(entry, at).map(usize::from));
    let [Some(name_len), Some(extra_len), Some(comment_len)] = lengths else { return Ok(None) };
    if !entry.starts_with(b"PK\x01\x02") {
        return Err(broken(file, "its directory holds something else than entries"));
    }
    let total = CENTRAL + name_len + extra_len + comment_len;
    let Some(body) = entry.get(CENTRAL..total) else { return Ok(None) };
    let Ok(name) = std::str::from_utf8(&body[..name_len]) else {
        return Err(broken(file, "the name of a member is not UTF-8"));
    };
    let short = |at| u32_at(entry, at).unwrap_or(0) as u64;
    let mut sizes = [short(24), short(20), short(42)];
    read_extra_64(&body[name_len..name_len + extra_len], &mut sizes);
    let [len, stored_len, local] = sizes;
    let flags = u16_at(entry, 8).unwrap_or(0);
    let method = u16_at(entry, 10).unwrap_or(0);
    let fault = |text: &str| Err(broken(file, &format!("its member {name} {text}")));
    if flags & 1 != 0 {
        return fault("is encrypted");
    }
    if !matches!(method, 0 | 8) {
        return fault(&format!("is packed by method {method}; stored and deflated are read"));
    }
    if method == 0 && len != stored_len {
        return fault("is stored plainly, but with two sizes");
    }
    let inside = |start: u64| start.checked_add(stored_len).is_some_and(|end| end <= file.len());
    if local.checked_add(LOCAL).is_none_or(|end| end > file.len()) {
        return fault("lies outside of the file");
    }
    let mut header = [0; LOCAL as usize];
    file.read_at(&mut header, local)?;
    let lengths = [26, 28].map(|at| u16_at(&header, at).unwrap_or(0) as u64);
    let start = local + LOCAL + lengths[0] + lengths[1];
    if !header.starts_with(b"PK\x03\x04") || lengths[0] != name_len as u64 || !inside(start) {
        return fault("lies outside of the file, or its header differs from the directory's");
    }
    let member = Member {
        name: name.to_string(),
        start,
        stored_len,
        len,
        deflated: method == 8,
        crc: u32_at(entry, 16).unwrap_or(0),
    };
    Ok(Some((member, &entry[total..])))
}

/// Replaces the sizes that did not fit into 32 bits by those of the zip64 field, in its order.
fn read_extra_64(mut extra: &[u8], sizes: &mut [u64; 3]) {
    while let (Some(id), Some(len)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some(field) = extra.get(4..4 + len as usize) else { return };
        if id == 1 {
            let large = sizes.iter_mut().filter(|size| **size == u32::MAX as u64);
            for (size, bytes) in large.zip(field.chunks_exact(8)) {
                *size = u64_at(bytes, 0).unwrap_or(*size);
            }
        }
        extra = &extra[4 + len as usize..];
    }
}

fn broken(file: &DataFile, text: &str) -> Error {
    let status = crate::error::Status::Format;
    Error::new(status, format!("{}: not a sound zip archive: {text}", file.path().display()))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
