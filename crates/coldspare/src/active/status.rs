//! What `status` says of the active; never better than the truth (G7).

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use coldspare_scan::bulk::Bulk;
use coldspare_scan::watch::{Watch, now_ms};
use serde_json::json;

use super::{Active, problem, rfc3339};

/// LIMIT: repositories that are listed with their lag.
const LAGGING_MAX: usize = 100;

impl Active {
    pub(super) fn status(&self) -> serde_json::Value {
        let watch = self.capture.watch.as_ref();
        let coverage = watch.map(Watch::coverage);
        let under_way = self.capture.under_way.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut waiting = watch.map(|w| w.dirty().waiting().clone()).unwrap_or_default();
        waiting.merge(under_way.waiting);
        self.taken.values().for_each(|taken| waiting.merge(taken.waiting.clone()));
        let (put_off_since, put_off) = self.capture.bulk.as_ref().map(Bulk::waiting).unwrap_or_default();
        waiting.merge(put_off);
        let waiting = waiting.longest_first();
        let hinted = watch.and_then(|w| w.dirty().oldest_ms());
        let oldest = hinted.into_iter().chain(self.taken.values().filter_map(|t| t.oldest_ms)).chain(under_way.oldest_ms);
        let oldest = oldest.chain(put_off_since).min();
        let now = now_ms();
        let lagging: Vec<_> = waiting
            .iter()
            .take(LAGGING_MAX)
            .map(|((root, path), since)| json!({"root": root.0, "path": path.to_string(), "lag_ms": now.saturating_sub(*since)}))
            .collect();
        let is_covered = coverage.is_some_and(|c| c.unwatched == 0) && watch.is_some_and(|w| !w.is_stale());
        // Never better than the truth: without a full watch, all since the last look may be missing.
        let behind_since = match (oldest, is_covered && self.follow.is_idle() && !self.has_put_off()) {
            (None, true) => None,
            (oldest, _) => Some(oldest.into_iter().chain(self.as_of_ms).min()),
        };
        let lag_ms = match behind_since {
            None => Some(0),
            Some(since) => since.map(|s| now.saturating_sub(s)),
        };
        let as_of = if behind_since.is_none() { Some(now) } else { self.as_of_ms };
        let (held, unlisted) = self.capture.held.list();
        let proofs = self.prover.as_ref().map(|p| &p.proofs);
        let (resident, peak) = coldspare_os::resident_bytes();
        json!({
            "role": self.record.role.word(),
            "epoch": self.session.epoch.0,
            "session": self.session.id.to_string(),
            "seq": self.follow.last_acked().0,
            "as_of": as_of.map(rfc3339),
            "as_of_ms": as_of,
            "lag_ms": lag_ms,
            "lag_by_repository": lagging,
            "lagging_repositories": waiting.len(),
            "connected": self.follow.is_up(),
            "peer": self.peer.as_ref().map(|p| json!({"address": p.address, "build": p.build, "rtt_ms": p.link.stats().rtt.as_millis() as u64})),
            "link": {
                "congestion": self.config.link.congestion,
                "bytes_per_second_max": self.limit,
                "lost_packets": self.peer.as_ref().map(|p| p.link.stats().lost_packets),
            },
            "watch": {
                "backend": watch.map_or("scan", Watch::backend),
                "why": self.watch_why,
                "coverage": coverage.map_or(0.0, |c| c.share()),
                "watched": coverage.map_or(0, |c| c.watched),
                "unwatched": coverage.map_or(0, |c| c.unwatched),
                "overflows": coverage.map_or(0, |c| c.overflows),
                "missed": proofs.map_or(0, |p| p.missed.load(Ordering::Relaxed)),
                "proofs": proofs.map_or(0, |p| p.passes.load(Ordering::Relaxed)),
                "proved_as_of": proofs.map(|p| p.as_of_ms.load(Ordering::Relaxed)).filter(|ms| *ms > 0).map(rfc3339),
            },
            "held_back": held.iter().map(problem).collect::<Vec<_>>(),
            "held_back_unlisted": unlisted,
            "waiting_for_decision": self.undecided.as_ref().map(|reason| json!({"reason": reason})),
            "trouble": self.trouble(),
            "files_read": self.tally.files_read,
            "bytes_read": self.tally.bytes_read,
            "bytes_sent": self.tally_now().bytes_sent,
            "special_skipped": self.tally.special,
            "resident_bytes": resident,
            "resident_peak_bytes": peak,
            "build": crate::BUILD,
        })
    }
}
