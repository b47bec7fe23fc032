//! The points that the standby can go back to, and how many of them are kept.
//!
//! Invariants: the oldest point and the tree as it is are always there; points go from the oldest on. That a point is gone
//! is durable before anything is removed of what led back to it; what a crash leaves of that is removed later.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use coldspare_core::RootId;
use coldspare_core::control::Applied;
use coldspare_os::Disk;
use redb::ReadableTable;

use crate::error::{StandbyError, io};
use crate::history::{FIRST, FLOOR, HISTORY_DIR, NEXT, history_key};
use crate::row::PointRow;
use crate::standby::Standby;
use crate::store::{HISTORY, META, POINTS};

/// The number of a point: counts the changesets that became the tree here; never used twice in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PointNo(pub u64);

impl fmt::Display for PointNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A tree that the standby can go back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its number.
    pub no: PointNo,
    /// The changeset that it is.
    pub applied: Applied,
    /// Milliseconds since 1970 on the standby's clock: when it became the tree.
    pub at_ms: u64,
    /// Paths in which it differs from the point before.
    pub changes: u64,
    /// Bytes that are kept for the sake of the point before.
    pub bytes: u64,
    /// Whether it came about by going back to another.
    pub is_rewind: bool,
    /// Where the database stood soon after that, in its own words.
    pub position: Option<String>,
}

/// How much of the history is kept, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Milliseconds: the tree of any moment within them can be had again.
    pub age_ms: u64,
    /// Bytes of what is kept.
    pub space_bytes: u64,
    /// Bytes that stay free on the filesystem of each root; below, points go before anything else stops.
    pub free_bytes: u64,
}

/// Rows that are removed from the store at once.
const ROWS_AT_ONCE: usize = 10_000;
/// Of the space that may be used one part of so many is free once points had to go: so that not each changeset has one go.
const ROOM_SHARE: u64 = 10;

impl<D: Disk> Standby<D> {
    /// Keeps no more of the history than this; without it nothing of it ever goes.
    pub fn with_history(mut self, limits: HistoryLimits) -> Standby<D> {
        self.history_limits = Some(limits);
        self
    }

    /// The points, the oldest first; the last one is the tree as it is.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn points(&self) -> Result<Vec<Point>, StandbyError> {
        let floor = self.history_number(FLOOR, 0)?;
        let rows = self.store.read(|txn| {
            let rows: Result<Vec<_>, redb::Error> = txn
                .open_table(POINTS)?
                .range(floor..)?
                .map(|row| row.map(|(no, v)| (no.value(), v.value().to_vec())).map_err(Into::into))
                .collect();
            rows
        })?;
        rows.into_iter()
            .map(|(no, value)| {
                let PointRow { applied, at_ms, changes, bytes, is_rewind, position } = self.store.decode(&value)?;
                let (changes, bytes) = if no == floor { (0, 0) } else { (changes, bytes) };
                Ok(Point { no: PointNo(no), applied, at_ms, changes, bytes, is_rewind, position })
            })
            .collect()
    }

    /// Takes note of where the database stands, for a point that is there still. It is durable with the next changeset.
    ///
    /// # Errors
    /// `Store`.
    pub fn note_position(&self, no: PointNo, position: &str) -> Result<(), StandbyError> {
        self.store.write_lazily(|txn| {
            let mut points = txn.open_table(POINTS)?;
            let row = points.get(no.0)?.and_then(|row| coldspare_core::codec::decode::<PointRow>(row.value()).ok());
            if let Some(row) = row {
                let row = PointRow { position: Some(position.into()), ..row };
                points.insert(no.0, coldspare_core::codec::encode(&row).as_slice())?;
            }
            Ok(())
        })
    }

    /// The number of the point that the next changeset leads to.
    pub(crate) fn next_point(&self) -> Result<PointNo, StandbyError> {
        self.history_number(NEXT, FIRST).map(PointNo)
    }

    /// Whether a point is the last one that the active brought.
    pub(crate) fn is_latest(&self, no: PointNo) -> Result<bool, StandbyError> {
        Ok(self.points()?.iter().rev().find(|point| !point.is_rewind).is_some_and(|point| point.no == no))
    }

    fn history_number(&self, name: &str, default: u64) -> Result<u64, StandbyError> {
        self.store.read(|txn| Ok(txn.open_table(META)?.get(name)?.map_or(default, |v| v.value())))
    }

    /// Lets points go that are beyond the limits, the oldest first; how many went.
    ///
    /// Changesets are applied meanwhile.
    ///
    /// Cost: a pass over the points; one durable transaction when some go, and the removal of what they need.
    ///
    /// # Errors
    /// `Store`, `Damaged`, `Io`: what is left of it goes with the next call.
    pub fn prune_history(&self) -> Result<usize, StandbyError> {
        let Some(limits) = self.history_limits else { return Ok(0) };
        let _nobody_reads = self.history_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let points = self.points()?;
        let mut gone = beyond(&points, limits, self.disk.now_ms());
        self.let_go(&points, gone)?;
        while self.is_short(limits.free_bytes) && gone + 1 < points.len() {
            gone += 1;
            self.let_go(&points, gone)?;
        }
        Ok(gone)
    }

    /// Lets all points go but the tree as it is, for the room that they take; whether there were any.
    pub(crate) fn drop_history(&self) -> Result<bool, StandbyError> {
        // Somebody who reads it may be what the room is needed for: nobody waits.
        let Ok(_nobody_reads) = self.history_lock.try_lock() else { return Ok(false) };
        let points = self.points()?;
        let gone = points.len().saturating_sub(1);
        if gone > 0 {
            tracing::warn!(points = gone, "space is short: the history goes");
        }
        self.let_go(&points, gone)?;
        Ok(gone > 0)
    }

    /// Whether so many bytes are free on the filesystem of a root; lets the oldest points go for that, where what they take
    /// may be enough.
    pub(crate) fn make_room_for(&self, root: RootId, bytes: u64) -> Result<bool, StandbyError> {
        let missing = || self.disk.space(&self.root(root).dir).map_or(0, |space| bytes.saturating_sub(space.free_bytes));
        if missing() == 0 {
            return Ok(true);
        }
        let Ok(_nobody_reads) = self.history_lock.try_lock() else { return Ok(false) };
        let points = self.points()?;
        if points.iter().map(|point| point.bytes).sum::<u64>() < missing() {
            return Ok(false);
        }
        let mut gone = 0;
        while missing() > 0 && gone + 1 < points.len() {
            gone += 1;
            self.let_go(&points, gone)?;
        }
        tracing::warn!(points = gone, "space is short for what the active has: the oldest points go");
        Ok(missing() == 0)
    }

    fn is_short(&self, free_bytes: u64) -> bool {
        self.roots.iter().any(|root| self.disk.space(&root.dir).is_ok_and(|space| space.free_bytes < free_bytes))
    }

    /// Lets the first `count` points go.
    fn let_go(&self, points: &[Point], count: usize) -> Result<(), StandbyError> {
        let Some(floor) = points.get(count).map(|point| point.no) else { return Ok(()) };
        if count > 0 {
            self.store.write(|txn| {
                let mut table = txn.open_table(POINTS)?;
                table.retain_in(..floor.0, |_, _| false)?;
                txn.open_table(META)?.insert(FLOOR, floor.0)?;
                Ok(())
            })?;
        }
        if count > 0 || !self.is_history_swept.load(Ordering::Relaxed) {
            self.remove_below(floor)?;
            self.is_history_swept.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Removes what led back to points before `floor`.
    fn remove_below(&self, floor: PointNo) -> Result<(), StandbyError> {
        for root in &self.roots {
            let history = &root.history;
            for listed in self.disk.list(history).map_err(io("listing", HISTORY_DIR))? {
                let point = std::str::from_utf8(&listed.name).ok().and_then(|name| name.parse().ok()).map(PointNo);
                if point.is_none_or(|point| point <= floor) {
                    self.remove_all(history, &listed.name).map_err(io("removing", HISTORY_DIR))?;
                }
            }
        }
        let end = history_key(PointNo(floor.0 + 1), b"");
        loop {
            let removed = self.store.write_lazily(|txn| {
                let mut rows = txn.open_table(HISTORY)?;
                let some: Result<Vec<_>, redb::Error> =
                    rows.range::<&[u8]>(..end.as_slice())?.take(ROWS_AT_ONCE).map(|row| Ok(row?.0.value().to_vec())).collect();
                let some = some?;
                some.iter().try_for_each(|k| rows.remove(k.as_slice()).map(drop))?;
                Ok(some.len())
            })?;
            if removed < ROWS_AT_ONCE {
                return Ok(());
            }
        }
    }

    /// What another store left in the history leads back to no point of this one.
    pub(crate) fn forget_other_history(&self) -> Result<(), StandbyError> {
        if !self.points()?.is_empty() || self.is_applying() {
            return Ok(());
        }
        for root in &self.roots {
            for listed in self.disk.list(&root.history).map_err(io("listing", HISTORY_DIR))? {
                if listed.name.starts_with(OLD) {
                    continue; // of a store before that
                }
                let to = [OLD, self.fresh_name().as_slice()].concat();
                self.disk.rename(&root.history, &listed.name, &root.history, &to).map_err(io("renaming in", HISTORY_DIR))?;
            }
        }
        Ok(())
    }
}

/// What the names begin with of what no store knows any more.
const OLD: &[u8] = b"old-";
/// Bytes of a point's number in a key.
pub(crate) const POINT_BYTES: usize = 8;

/// How many of the points, from the oldest on, are beyond the limits.
fn beyond(points: &[Point], limits: HistoryLimits, now_ms: u64) -> usize {
    let last = points.len().saturating_sub(1);
    // The tree of a point is that of every moment until the next one.
    let is_old = |next: &Point| next.at_ms.saturating_add(limits.age_ms) < now_ms;
    let old = points.iter().skip(1).take_while(|next| is_old(next)).count();
    let total = |gone: usize| points.iter().skip(gone + 1).map(|point| point.bytes).sum::<u64>();
    let mut gone = old.min(last);
    let mut left = total(gone);
    if left > limits.space_bytes {
        while left > limits.space_bytes - limits.space_bytes / ROOM_SHARE && gone < last {
            gone += 1;
            left -= points[gone].bytes;
        }
    }
    gone
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Seq, SessionId};

    use super::*;

    fn point(no: u64, at_ms: u64, bytes: u64) -> Point {
        let applied = Applied { session: SessionId([1; 16]), seq: Seq(no), as_of_ms: at_ms };
        Point { no: PointNo(no), applied, at_ms, changes: 1, bytes, is_rewind: false, position: None }
    }

    #[track_caller]
    fn check(points: &[(u64, u64)], age_ms: u64, space_bytes: u64, expected: usize) {
        let points: Vec<Point> = (1..).zip(points).map(|(no, (at_ms, bytes))| point(no, *at_ms, *bytes)).collect();
        assert_eq!(beyond(&points, HistoryLimits { age_ms, space_bytes, free_bytes: 0 }, 1000), expected);
    }

    #[test]
    fn the_oldest_points_go_and_the_last_one_stays() {
        check(&[], 100, 100, 0);
        check(&[(1, 0)], 0, 0, 0);
        // The tree of 900 ms is that of the second point.
        check(&[(100, 0), (200, 50), (950, 50)], 100, 1000, 1);
        check(&[(100, 0), (200, 50), (300, 50)], 100, 1000, 2);
        check(&[(100, 0), (200, 50), (300, 50)], 5000, 1000, 0);
        // Some room is made at once.
        check(&[(1, 0), (2, 50), (3, 50), (4, 50)], 5000, 140, 1);
        check(&[(1, 0), (2, 50), (3, 50), (4, 50)], 5000, 100, 2);
        check(&[(1, 0), (2, 50)], 5000, 0, 1);
    }
}
