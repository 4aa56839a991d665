-- For the home page, index.qmd, which shows README.md.

-- The name of the course stands above it already.
function Header(el)
  if el.level == 1 then return {} end
end

-- The guides for contributors are files of the repository and no pages.
function Link(el)
  if el.target:match("^[%u_]+%.%l+$") then return el.content end
end
