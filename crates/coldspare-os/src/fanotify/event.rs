//! What a read of a queue holds: a pure function from bytes.
//!
//! Source: `fanotify(7)`; `struct fanotify_event_metadata` and the information records behind it.

use super::FsId;

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'b> {
    /// What happened.
    pub change: Change,
    /// Whether it happened to a directory.
    pub is_dir: bool,
    /// Who did it: the process, or 0.
    pub pid: u32,
    /// The filesystem; `None` for [`Change::Lost`].
    pub fs: Option<FsId>,
    /// The handle of the directory, with its length and type.
    pub dir: &'b [u8],
    /// The entry in it; `.` for the directory itself.
    pub name: &'b [u8],
}

/// What happened, the weightiest when several events are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Content or attributes.
    Content,
    /// The name came, went, or moved.
    Name,
    /// The queue was full: events are missing.
    Lost,
}

/// The bytes are no events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

const METADATA_BYTES: usize = 24;
const VERSION: u8 = 3;
const RECORD_HEAD: usize = 4;
const FS_BYTES: usize = 8;

/// The events in `bytes`, in order; ends with the first that can't be understood.
pub fn events(bytes: &[u8]) -> impl Iterator<Item = Result<Event<'_>, Malformed>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = parse(rest);
        rest = parsed.map_or(&[], |(_, rest)| rest);
        Some(parsed.map(|(event, _)| event).ok_or(Malformed))
    })
}

/// The first event, and what is behind it.
fn parse(bytes: &[u8]) -> Option<(Event<'_>, &[u8])> {
    let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let head = usize::from(u16_at(bytes, 6)?);
    if *bytes.get(4)? != VERSION || head < METADATA_BYTES || length < head || length > bytes.len() {
        return None;
    }
    let (event, rest) = bytes.split_at(length);
    let mask = u64::from_ne_bytes(event.get(8..16)?.try_into().ok()?);
    let pid = u32_at(event, 20)?;
    let change = if mask & libc::FAN_Q_OVERFLOW != 0 {
        Change::Lost
    } else if mask & (libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVE) != 0 {
        Change::Name
    } else {
        Change::Content
    };
    let mut out = Event { change, is_dir: mask & libc::FAN_ONDIR != 0, pid, fs: None, dir: &[], name: &[] };
    let mut records = &event[head..];
    while !records.is_empty() {
        let length = usize::from(u16_at(records, 2)?);
        if length < RECORD_HEAD || length > records.len() {
            return None;
        }
        let (record, behind) = records.split_at(length);
        records = behind;
        if [libc::FAN_EVENT_INFO_TYPE_DFID_NAME, libc::FAN_EVENT_INFO_TYPE_DFID].contains(&record[0]) {
            let body = &record[RECORD_HEAD..];
            out.fs = Some(body.get(..FS_BYTES)?.try_into().ok()?);
            let handle = &body[FS_BYTES..];
            let handle_bytes = super::HANDLE_HEAD.checked_add(usize::try_from(u32_at(handle, 0)?).ok()?)?;
            let (dir, name) = handle.split_at_checked(handle_bytes)?;
            out.dir = dir;
            out.name = name.split(|&b| b == 0).next().unwrap_or_default();
        }
    }
    Some((out, rest))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An event with one record, as the kernel lays it out.
    fn raw(mask: u64, name: &[u8]) -> Vec<u8> {
        let mut record = vec![libc::FAN_EVENT_INFO_TYPE_DFID_NAME, 0, 0, 0];
        record.extend([9; 8]);
        record.extend(4_u32.to_ne_bytes());
        record.extend(1_u32.to_ne_bytes());
        record.extend(*b"hand");
        record.extend(name);
        record.extend([0; 3]);
        let length = u16::try_from(record.len()).unwrap();
        record[2..4].copy_from_slice(&length.to_ne_bytes());
        let mut event = Vec::new();
        event.extend((u32::from(length) + 24).to_ne_bytes());
        event.extend([VERSION, 0]);
        event.extend(24_u16.to_ne_bytes());
        event.extend(mask.to_ne_bytes());
        event.extend((-1_i32).to_ne_bytes());
        event.extend(77_u32.to_ne_bytes());
        event.extend(record);
        event
    }

    #[test]
    fn an_event_has_its_directory_and_name() {
        let bytes = [raw(libc::FAN_MODIFY, b"f"), raw(libc::FAN_MOVED_TO | libc::FAN_ONDIR, b"d")].concat();
        let found: Vec<_> = events(&bytes).map(Result::unwrap).collect();
        let dir = [&4_u32.to_ne_bytes()[..], &1_u32.to_ne_bytes(), b"hand"].concat();
        let first = Event { change: Change::Content, is_dir: false, pid: 77, fs: Some([9; 8]), dir: &dir, name: b"f" };
        assert_eq!(found, [first, Event { change: Change::Name, is_dir: true, name: b"d", ..first }]);
    }

    #[test]
    fn what_is_cut_off_is_malformed_and_ends_it() {
        let whole = raw(libc::FAN_MODIFY, b"name");
        for length in 1..whole.len() {
            let found: Vec<_> = events(&whole[..length]).collect();
            assert_eq!(found, [Err(Malformed)], "{length} bytes");
        }
        for (at, value) in [(4, 2), (6, 3), (24 + 2, 1), (24 + 2, 200), (24 + 12, 250)] {
            let mut broken = whole.clone();
            broken[at] = value;
            assert_eq!(events(&broken).collect::<Vec<_>>(), [Err(Malformed)], "byte {at}");
        }
    }

    #[test]
    fn a_full_queue_is_said() {
        let mut bytes = raw(libc::FAN_Q_OVERFLOW, b"");
        bytes.truncate(24);
        bytes[0] = 24;
        let found: Vec<_> = events(&bytes).map(Result::unwrap).collect();
        assert_eq!(found[0].change, Change::Lost);
        assert_eq!(found[0].fs, None);
    }
}
