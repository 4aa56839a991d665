-- For the home page, index.qmd, which shows README.md.

-- The name of the course stands above it already.
function Header(el)
  if el.level == 1 then return {} end
end
