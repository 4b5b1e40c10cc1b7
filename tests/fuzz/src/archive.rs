//! Zip archives that are sound whatever lies in them, so that what lies in them is read.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

/// The most that a member is inflated to here.
const INFLATED: u64 = 1 << 20;

#[derive(Clone)]
pub struct Member {
    pub name: String,
    pub bytes: Vec<u8>,
    pub deflated: bool,
}

impl Member {
    pub fn stored(name: &str, bytes: &[u8]) -> Member {
        Member { name: name.to_string(), bytes: bytes.to_vec(), deflated: false }
    }
}

/// An archive of these members, with the right sizes, offsets and checksums.
pub fn zip(members: &[Member]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for member in members {
        let body = match member.deflated {
            true => deflate(&member.bytes),
            false => member.bytes.clone(),
        };
        let name = &member.name.as_bytes()[..member.name.len().min(u16::MAX.into())];
        let mut crc = flate2::Crc::new();
        crc.update(&member.bytes);
        let mut common = Vec::new();
        let method = if member.deflated { 8 } else { 0 };
        for field in [20u16, 0x800, method, 0, 0x21] {
            common.extend(field.to_le_bytes());
        }
        for field in [crc.sum(), body.len() as u32, member.bytes.len() as u32] {
            common.extend(field.to_le_bytes());
        }
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0; 2]);
        let start = out.len() as u32;
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name);
        out.extend(&body);
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(start.to_le_bytes());
        directory.extend(name);
    }
    let (start, count) = (out.len() as u32, members.len() as u16);
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

/// The members of a sound archive without zip64; none of anything else.
pub fn unzip(bytes: &[u8]) -> Option<Vec<Member>> {
    let end = bytes.windows(4).rposition(|w| w == b"PK\x05\x06")?;
    let mut at = u32_at(bytes, end + 16)? as usize;
    let mut members = Vec::new();
    for _ in 0..u16_at(bytes, end + 10)? {
        let entry = bytes.get(at..)?;
        if !entry.starts_with(b"PK\x01\x02") {
            return None;
        }
        let [name, extra, comment] = [28, 30, 32].map(|at| u16_at(entry, at));
        let (name, extra, comment) = (name? as usize, extra? as usize, comment? as usize);
        let local = bytes.get(u32_at(entry, 42)? as usize..)?;
        let start = 30 + u16_at(local, 26)? as usize + u16_at(local, 28)? as usize;
        let body = local.get(start..)?.get(..u32_at(entry, 20)? as usize)?;
        let deflated = u16_at(entry, 10)? == 8;
        members.push(Member {
            name: String::from_utf8(entry.get(46..46 + name)?.to_vec()).ok()?,
            bytes: if deflated { inflate(body)? } else { body.to_vec() },
            deflated,
        });
        at += 46 + name + extra + comment;
    }
    Some(members)
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).expect("memory takes all that is written");
    encoder.finish().expect("memory takes all that is written")
}

fn inflate(body: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    DeflateDecoder::new(body).take(INFLATED).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
