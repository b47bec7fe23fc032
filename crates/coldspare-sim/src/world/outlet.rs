//! From a capture to the wire: what waits for room or for an answer lets the world go on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use coldspare_core::changeset::{Ask, Have};
use coldspare_core::{Baseline, Op, Seq};
use coldspare_delta::{Packed, unpack};
use coldspare_scan::capture::{Closed, FilePart, Outlet};

use super::wire::{FRAMES_MAX, Frame, ToStandby};
use super::{Shared, World, lock};

/// One changeset on its way.
pub(super) struct Changeset<'a> {
    pub(super) world: &'a Shared,
    pub(super) link: u64,
    pub(super) seq: Seq,
    pub(super) baseline: Baseline,
    pub(super) acked: Seq,
    pub(super) has_begun: AtomicBool,
    pub(super) batches: AtomicU64,
    pub(super) segments: AtomicU64,
}

impl Changeset<'_> {
    /// Lets the world go on until `ready`.
    fn wait<T>(&self, mut ready: impl FnMut(&mut World) -> Option<T>) -> Result<T, Closed> {
        loop {
            let mut world = lock(self.world);
            if !world.active.may_send(self.link) || world.violation.is_some() {
                return Err(Closed);
            }
            if let Some(out) = ready(&mut world) {
                return Ok(out);
            }
            world.step();
        }
    }

    fn begin(&self, world: &mut World) {
        if !self.has_begun.swap(true, Ordering::Relaxed) {
            world.tell(|| format!("active: begin {} {:?}", self.seq, self.baseline));
            // One that asked, and in the end had nothing to say, is a changeset too.
            let session = world.active.session();
            world.oracle.sent(session, self.seq, self.baseline, &[]);
            world.say_to_standby(self.link, ToStandby::Begin(self.seq, self.baseline, self.acked));
        }
    }

    fn send(&self, frame: Frame) -> Result<(), Closed> {
        let link = self.link;
        self.wait(|world| (world.wire.frames(link) < FRAMES_MAX).then_some(()))?;
        let mut world = lock(self.world);
        self.begin(&mut world);
        world.send_frame(link, frame);
        Ok(())
    }
}

impl Outlet for Changeset<'_> {
    fn batch(&self, ops: Vec<Op>, payload: Packed, raw_len: usize) -> Result<(), Closed> {
        {
            let mut world = lock(self.world);
            let session = world.active.session();
            world.oracle.sent(session, self.seq, self.baseline, &ops);
        }
        self.send(Frame::Batch(self.seq, ops, raw(payload, raw_len)))?;
        self.batches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.send(Frame::Segment(self.seq, part, raw(literal, raw_len)))?;
        self.segments.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        let no = self.wait(|world| {
            self.begin(world);
            let no = world.active.next_question();
            world.say_to_standby(self.link, ToStandby::Ask(no, items.clone()));
            Some(no)
        })?;
        self.wait(|world| world.active.answer(no))
    }
}

fn raw(packed: Packed, raw_len: usize) -> Vec<u8> {
    match packed {
        Packed::Raw(bytes) => bytes,
        Packed::Zstd(bytes) => unpack(&bytes, raw_len).expect("what was packed"),
    }
}
