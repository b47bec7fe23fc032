//! The manifest as one changeset left it, to be compared with what the active sent.

use coldspare_core::compare::{Cut, Cutter, LeftOut, Span, Tally, Tree, Without, tally};
use coldspare_core::{Entry, Seq, SessionId, codec};
use coldspare_os::Disk;
use rayon::prelude::*;

use crate::error::StandbyError;
use crate::standby::Standby;
use crate::store::{MANIFEST, View};

/// The manifest at one changeset; it stays as it is.
pub struct Held {
    manifest: View,
    without: Without,
    /// All of it in parts, where nothing is left out.
    whole: Option<Cut>,
}

impl<D: Disk> Standby<D> {
    /// The manifest of changeset `seq`; `None` when the tree isn't that, or the active has to name everything again.
    ///
    /// # Errors
    /// `Store`.
    pub fn held_at(&self, session: SessionId, seq: Seq) -> Result<Option<Held>, StandbyError> {
        let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_it = !self.is_applying() && self.applied().is_some_and(|a| (a.session, a.seq) == (session, seq));
        if !is_it || self.needs_everything()? {
            return Ok(None);
        }
        Ok(Some(Held { manifest: self.store.view(MANIFEST)?, without: Without::default(), whole: None }))
    }

    /// Has the active name everything: the manifest may be wrong.
    ///
    /// # Errors
    /// `Store`.
    pub fn distrust(&self) -> Result<(), StandbyError> {
        self.store.write(|txn| crate::store::Store::set_distrusted(txn, true))
    }
}

impl Held {
    /// Cuts all of it, as the active does meanwhile: when nothing is left out and nothing differs, that is all there is to do.
    ///
    /// It ends as soon as `is_needed` says `false`, and nothing is cut then.
    ///
    /// Cost: one pass over the manifest.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn cut_ahead(&mut self, is_needed: impl Fn() -> bool) -> Result<(), StandbyError> {
        let mut cutter = Cutter::new(self.manifest.len()?);
        self.entries(&Span::all(), &mut |k, entry| {
            cutter.add(k, entry);
            is_needed()
        })?;
        self.whole = is_needed().then(|| cutter.finish());
        Ok(())
    }

    /// Leaves out what the active may have otherwise.
    pub fn leave_out(&mut self, left_out: &[LeftOut]) {
        self.without = Without::new(left_out);
        // Else what is left out took part, too.
        self.whole = self.whole.take().filter(|_| left_out.is_empty());
    }
}

impl Tree for Held {
    type Error = StandbyError;

    fn keys(&self, span: &Span, each: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), StandbyError> {
        self.entries(span, &mut |k, _| each(k))
    }

    fn entries(&self, span: &Span, each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), StandbyError> {
        self.manifest.for_each_raw_from(&span.from, &span.to, |k, value| {
            if !self.without.takes_part(k) {
                return Ok(true);
            }
            // Its seal is looked at where the tree is compared with it; a row that is damaged differs here.
            let (_, behind) = codec::decode_first::<Entry>(value).map_err(|e| self.manifest.damaged(e.to_string()))?;
            Ok(each(k, &value[..value.len() - behind.len()]))
        })
    }

    fn whole(&self) -> Option<&Cut> {
        self.whole.as_ref()
    }

    fn tallies(&self, spans: &[Span]) -> Result<Vec<Tally>, StandbyError> {
        spans.par_iter().map(|span| tally(self, span)).collect()
    }
}
