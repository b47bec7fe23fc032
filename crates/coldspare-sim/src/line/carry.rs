//! The threads of one direction: one reads and decides, one waits and writes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::way::{Fate, Way};
use super::{End, Shared, since};

/// How long a thread may take to notice that the line is gone.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longer than any packet of a device.
const PACKET_MAX: usize = 65_536;

/// When a packet is due, and the packet.
type Due = (Duration, Vec<u8>);

/// Carries from one end to the other, until the line ends; `no` is the direction's.
pub(super) fn start(from: &End, to: &End, shared: &Arc<Shared>, no: usize, seed: u64) -> io::Result<()> {
    let (from, to) = (from.device.try_clone()?, to.device.try_clone()?);
    let (sender, receiver) = channel();
    let begin = Instant::now();
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name.into()).spawn(work);
    let here = shared.clone();
    spawn("line-in", Box::new(move || take(from, &sender, &here, no, Way::new(seed), begin)))?;
    let here = shared.clone();
    spawn("line-out", Box::new(move || deliver(to, &receiver, &here, no, begin)))?;
    Ok(())
}

fn take(mut from: File, sender: &Sender<Due>, shared: &Shared, no: usize, mut way: Way, begin: Instant) {
    let counts = &shared.counts[no];
    let mut packet = vec![0; PACKET_MAX];
    while !shared.ends.load(Ordering::Relaxed) {
        let len = match from.read(&mut packet) {
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_EVERY.subsec_nanos()) };
                let _ = poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&timeout));
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if shared.is_cut.load(Ordering::Relaxed) {
            count(&counts.blocked);
            continue;
        }
        let fate = way.take(&shared.quality(), since(begin), &packet[..len]);
        match fate {
            Fate::Arrives(at) => {
                if sender.send((at, packet[..len].to_vec())).is_err() {
                    return;
                }
            }
            Fate::Lost => count(&counts.lost),
            Fate::Overflowed => count(&counts.overflowed),
            Fate::TooLong => count(&counts.too_long),
            Fate::Blocked => count(&counts.blocked),
        }
    }
}

fn deliver(mut to: File, receiver: &Receiver<Due>, shared: &Shared, no: usize, begin: Instant) {
    let counts = &shared.counts[no];
    while !shared.ends.load(Ordering::Relaxed) {
        let (at, packet) = match receiver.recv_timeout(LOOK_EVERY) {
            Ok(due) => due,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        std::thread::sleep(at.saturating_sub(since(begin)));
        if shared.is_cut.load(Ordering::Relaxed) {
            count(&counts.blocked);
        } else if to.write(&packet).is_ok() {
            count(&counts.arrived);
            counts.arrived_bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
