//! What a file holds: pages that are shared until they are written, and holes.

use std::sync::Arc;

use super::hash;

/// Bytes of a page, as the kernel's.
const PAGE_BYTES: usize = 4096;

/// The bytes of a file; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    len: u64,
    /// `None` is a hole. A page may hold fewer bytes than a page has; the rest are zeros.
    pages: Vec<Option<Page>>,
    /// Of all pages, in any order.
    hash: u64,
}

#[derive(Debug, Clone)]
struct Page {
    bytes: Arc<[u8]>,
    hash: u64,
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Pages that are no holes, in bytes.
    pub(super) fn allocated_bytes(&self) -> u64 {
        (self.pages.iter().flatten().count() * PAGE_BYTES) as u64
    }

    pub(super) fn hash(&self) -> u64 {
        hash::mix(self.hash, self.len)
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let count = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        for (number, start, range) in parts(offset, count) {
            let out = &mut buf[range];
            out.fill(0);
            if let Some(page) = self.pages.get(number).and_then(Option::as_ref)
                && let Some(there) = page.bytes.get(start..)
            {
                let some = there.len().min(out.len());
                out[..some].copy_from_slice(&there[..some]);
            }
        }
        count
    }

    pub(super) fn all(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        self.read(0, &mut out);
        out
    }

    /// Whether it holds exactly these bytes.
    pub(super) fn is(&self, bytes: &[u8]) -> bool {
        let page_is = |(n, want): (usize, &[u8])| match self.pages.get(n).and_then(Option::as_ref) {
            None => want.iter().all(|b| *b == 0),
            Some(page) => {
                let some = page.bytes.len().min(want.len());
                page.bytes[..some] == want[..some] && want[some..].iter().all(|b| *b == 0)
            }
        };
        self.len == bytes.len() as u64 && bytes.chunks(PAGE_BYTES).enumerate().all(page_is)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (number, start, range) in parts(offset, bytes.len()) {
            let new = &bytes[range];
            let old = self.pages.get(number).and_then(Option::as_ref).map_or(&[][..], |p| &p.bytes);
            if start == 0 && new.len() >= old.len() {
                self.set(number, Some(new.into()));
                continue;
            }
            let mut page = old.to_vec();
            page.resize(old.len().max(start + new.len()), 0);
            page[start..start + new.len()].copy_from_slice(new);
            self.set(number, Some(page.into()));
        }
        if !bytes.is_empty() {
            self.len = self.len.max(offset + bytes.len() as u64);
        }
    }

    /// Cuts, or grows by a hole.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            let (number, inside) = ((len / PAGE_BYTES as u64) as usize, (len % PAGE_BYTES as u64) as usize);
            for cut in (number + usize::from(inside > 0)..self.pages.len()).rev() {
                self.set(cut, None);
            }
            self.pages.truncate(number + usize::from(inside > 0));
            if inside > 0
                && let Some(Some(page)) = self.pages.get(number)
                && page.bytes.len() > inside
            {
                let kept = page.bytes[..inside].into();
                self.set(number, Some(kept));
            }
        }
        self.len = len;
    }

    fn set(&mut self, number: usize, bytes: Option<Arc<[u8]>>) {
        if self.pages.len() <= number {
            self.pages.resize(number + 1, None);
        }
        let page = bytes.map(|bytes| Page { hash: hash::mix(hash::bytes(&bytes), number as u64), bytes });
        let hash_of = |page: &Option<Page>| page.as_ref().map_or(0, |p| p.hash);
        self.hash = self.hash.wrapping_sub(hash_of(&self.pages[number])).wrapping_add(hash_of(&page));
        self.pages[number] = page;
    }
}

/// The pages that `count` bytes at `offset` lie on: number, start within the page, and which of the bytes.
fn parts(offset: u64, count: usize) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == count {
            return None;
        }
        let at = offset + done as u64;
        let (number, start) = ((at / PAGE_BYTES as u64) as usize, (at % PAGE_BYTES as u64) as usize);
        let some = (PAGE_BYTES - start).min(count - done);
        let part = (number, start, done..done + some);
        done += some;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_holes_read_as_written() {
        let mut content = Content::default();
        let mut plain = vec![0u8; 10_000];
        content.set_len(10_000);
        assert_eq!(content.allocated_bytes(), 0);
        for (at, len) in [(4090usize, 20usize), (0, 3), (8191, 2), (9_990, 10)] {
            content.write(at as u64, &vec![7; len]);
            plain[at..at + len].fill(7);
        }
        assert!(content.is(&plain));
        assert_eq!(content.all(), plain);
        for len in [9_000usize, 4_096, 4_093, 6_000, 0] {
            content.set_len(len as u64);
            plain.resize(len, 0);
            assert!(content.is(&plain), "{len}");
        }
        assert_eq!(content.hash(), Content::default().hash());
    }
}
