//! What the helper that has the kernel's queue tells the daemon: bytes on a socket between two processes of one build.

use std::io::{self, Read, Write};

use super::Process;

/// One message of the helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// From here on everything is told. What can't be watched is named with the reason.
    Begun { filesystems: u32, unwatched: Vec<(Vec<u8>, String)> },
    /// Nothing can be told.
    Failed { why: String },
    /// `name` in `dir` changed; an empty name is the directory itself. Who did it, where that is told.
    Changed { is_name: bool, dir: Vec<u8>, name: Vec<u8>, by: Option<Process> },
    /// Something changed that isn't told.
    Lost { why: String },
}

/// LIMIT: bytes of a field; a path has at most 4,096.
const FIELD_BYTES_MAX: usize = 64 << 10;
/// LIMIT: mounts that are named as unwatched.
const UNWATCHED_MAX: usize = 1_000;

impl Record {
    /// Writes it.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Record::Begun { filesystems, unwatched } => {
                out.write_all(&[0])?;
                out.write_all(&filesystems.to_le_bytes())?;
                let some = &unwatched[..unwatched.len().min(UNWATCHED_MAX)];
                out.write_all(&(some.len() as u32).to_le_bytes())?;
                for (path, why) in some {
                    field(out, path)?;
                    field(out, why.as_bytes())?;
                }
                Ok(())
            }
            Record::Failed { why } => {
                out.write_all(&[1])?;
                field(out, why.as_bytes())
            }
            Record::Changed { is_name, dir, name, by } => {
                out.write_all(&[2, u8::from(*is_name), u8::from(by.is_some())])?;
                field(out, dir)?;
                field(out, name)?;
                let Some(Process { pid, command, program }) = by else { return Ok(()) };
                out.write_all(&pid.to_le_bytes())?;
                field(out, command.as_bytes())?;
                field(out, program.as_bytes())
            }
            Record::Lost { why } => {
                out.write_all(&[3])?;
                field(out, why.as_bytes())
            }
        }
    }

    /// Reads the next one; `None` at the end.
    pub(super) fn read(input: &mut impl Read) -> io::Result<Option<Record>> {
        let mut kind = [0];
        if input.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let record = match kind[0] {
            0 => {
                let filesystems = number(input)?;
                let count = number(input)? as usize;
                if count > UNWATCHED_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let mut unwatched = Vec::new();
                for _ in 0..count {
                    unwatched.push((bytes(input)?, text(input)?));
                }
                Record::Begun { filesystems, unwatched }
            }
            1 => Record::Failed { why: text(input)? },
            2 => {
                let mut flags = [0; 2];
                input.read_exact(&mut flags)?;
                let (dir, name) = (bytes(input)?, bytes(input)?);
                let by = match flags[1] {
                    0 => None,
                    _ => Some(Process { pid: number(input)?, command: text(input)?, program: text(input)? }),
                };
                Record::Changed { is_name: flags[0] != 0, dir, name, by }
            }
            3 => Record::Lost { why: text(input)? },
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok(Some(record))
    }
}

fn field(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let some = &bytes[..bytes.len().min(FIELD_BYTES_MAX)];
    out.write_all(&(some.len() as u32).to_le_bytes())?;
    out.write_all(some)
}

fn number(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn bytes(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let length = number(input)? as usize;
    if length > FIELD_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut out = vec![0; length];
    input.read_exact(&mut out)?;
    Ok(out)
}

fn text(input: &mut impl Read) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&bytes(input)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_read_as_it_was_written() {
        let all = [
            Record::Begun { filesystems: 2, unwatched: vec![(b"/m".to_vec(), "no".into())] },
            Record::Failed { why: "x".into() },
            Record::Changed { is_name: true, dir: b"/a/b".to_vec(), name: b"c".to_vec(), by: None },
            Record::Changed {
                is_name: false,
                dir: b"/a".to_vec(),
                name: Vec::new(),
                by: Some(Process { pid: 7, command: "rm".into(), program: "/bin/rm".into() }),
            },
            Record::Lost { why: String::new() },
        ];
        let mut written = Vec::new();
        all.iter().try_for_each(|record| record.write(&mut written)).unwrap();
        let mut input = &written[..];
        for record in &all {
            assert_eq!(Record::read(&mut input).unwrap().as_ref(), Some(record));
        }
        assert_eq!(Record::read(&mut input).unwrap(), None);
        assert!(Record::read(&mut &written[..3]).is_err());
        assert!(Record::read(&mut &[1, 0xff, 0xff, 0xff, 0xff][..]).is_err());
    }
}
