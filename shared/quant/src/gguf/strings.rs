//! Many short texts in two pieces of memory: a vocabulary has a hundred thousand of them.

use std::ops::Index;

/// Texts in order, each behind the one before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Strings {
    text: String,
    /// Where each ends. A header is far smaller than 4 GiB.
    ends: Vec<u32>,
}

impl Strings {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|i| &self[i])
    }

    /// `None` if the bytes or one of the texts are no UTF-8. Each of `ends` is at least the one before it, and the last
    /// is the end of the bytes.
    pub(super) fn from_utf8(bytes: Vec<u8>, ends: Vec<u32>) -> Option<Strings> {
        let text = String::from_utf8(bytes).ok()?;
        ends.iter().all(|&end| text.is_char_boundary(end as usize)).then_some(Strings { text, ends })
    }
}

impl Index<usize> for Strings {
    type Output = str;

    fn index(&self, i: usize) -> &str {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.text[start as usize..self.ends[i] as usize]
    }
}

impl<T: AsRef<str>> FromIterator<T> for Strings {
    /// # Panics
    /// If the texts have 4 GiB or more together.
    fn from_iter<I: IntoIterator<Item = T>>(texts: I) -> Strings {
        let mut all = Strings::default();
        for text in texts {
            all.text.push_str(text.as_ref());
            all.ends.push(all.text.len().try_into().expect("a header is far smaller than 4 GiB"));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::Strings;

    #[test]
    fn texts_come_back_as_they_went_in() {
        let texts = ["", "a", "", "▁é", "two words"];
        let strings: Strings = texts.into_iter().collect();
        assert_eq!(strings.iter().collect::<Vec<_>>(), texts);
        assert_eq!((strings.len(), &strings[3], Strings::default().is_empty()), (5, "▁é", true));
    }

    #[test]
    fn a_character_in_two_texts_is_no_text() {
        let bytes = || "é".as_bytes().to_vec();
        assert!(Strings::from_utf8(bytes(), vec![0, 2]).is_some());
        assert!(Strings::from_utf8(bytes(), vec![1, 2]).is_none());
        assert!(Strings::from_utf8(vec![0xff], vec![1]).is_none());
    }
}
