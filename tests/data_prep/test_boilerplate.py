import pytest

from data_prep.boilerplate import is_boilerplate

BOILERPLATE = """
photographed on 12 May 2008
Photographed on May 12, 2008.
Photographed on 12th of May, 2008
photographed on 2008-05-12
Photographed on 12/05/2008
photographed 12.05.08
Photographed in May 2008
Photographed in the summer of 2008
Photo taken on Monday, May 12th 2008 at 2:30 pm
Picture taken: 2008:05:12 14:30:22
taken on 2008-05-12T14:30:22Z
Taken in 1987
Captured on 12-May-2008
Image uploaded on Sept. 3, 2011
photograph, circa 1910
Photo c. 1890s
Shot on 4th July '09
12 May 2008
May 2008
Summer 2008
2008
2008-05-12 14.30.22
IMG_1234
IMG_1234.JPG
img-20190101-wa0001.jpg
DSC_0001
DSC00012
DSCF1234.jpg
DSCN0045 copy
P1010001.JPG
_MG_4567
IMG 2034
PXL_20210512_143022123
100_1234.jpg
IMG_1234 (2)
Screenshot_20200512-143022
Untitled-1
untitled
Untitled photo
Photograph
a photograph
picture 12
Image 3 of 14
photo
no title
no caption
No description
Stock photo
Photo by Jane Doe
Photographed by Jane Doe on 12 May 2008
Photo credit: J. R. Smith
Image courtesy of NASA
Photo Courtesy Jane Doe / Getty Images
© Jane Doe 2010
Copyright 2014
© 2014, all rights reserved
https://example.com/a/b.jpg
click to enlarge
Click here for larger image
!!! ... ---
12345
★★★☆☆
""".strip().split("\n")
# captions of people, with words of the patterns in them
CAPTIONS = """
May flowers in the garden
March on Washington, 1963
On the march
A march in August
A man taking a photograph of the sea
Photograph of a lighthouse
Photographed in Paris on 12 May 2008
Wedding photographed in Tuscany
Summer in the city
Boeing 747 at the gate
BMW 320
Apollo 11
Route 66
Studio 54
IMG Worlds of Adventure, Dubai
P51 Mustang in flight
August Macke, Lady in a Green Jacket
New York, May 2008
Untitled by Mark Rothko
the picture house in Sheffield
A shot of espresso
Shot put at the games
Image of the Virgin Mary
Picture of Barack Obama
Images from Mars
Photo by the lake
Photo By The Lake
Picture postcard of Blackpool, 1905
4th of July fireworks over the river
1950s kitchen
2008 Olympics
Credit Suisse
Credit Suisse headquarters in Zurich
Courtesy call
A photographer takes a picture of the bride
Copy of the Mona Lisa
The Sunday market
Friday night lights
Samsung Galaxy
Sam and Max
Picture frame
Photo booth
Photo album from 1950
Default settings dialog
Sun over the sea
Sat on a wall
Taken 2, movie poster
A date at the cinema
Dates on a palm tree
Dec the halls
Mar del Plata
The Fall of Rome
Winter 1944 in the Ardennes
Junkers Ju 52
Nov Gorod fortress
12 Angry Men
The 39 Steps
Catch-22
A cat
red circle
Image processing pipeline
Unknown soldier
Copyright office building
Source of the Nile
Credits roll over a starry sky
Version control diagram
Jan Vermeer
April O'Neil cosplay
June bug
Mayor of London
Augustus of Prima Porta
A woman in the picture is dancing
DSC Arminia
WP Carey building
Pictures at an Exhibition
Shot by both sides, record cover
Getty Images Gallery opening
Posted sign in the woods
Wall clock at 2:30 pm
Concert poster, 12 May 2008
View from the top
untitled goose game
子犬
Ångström
""".strip().split("\n")


@pytest.mark.parametrize("caption", BOILERPLATE)
def test_what_tells_of_the_file_is_boilerplate(caption):
    assert is_boilerplate(caption)
    assert is_boilerplate(caption.upper())
    assert is_boilerplate(f'  "{caption}" ')


def test_wide_letters_are_read_as_plain_ones():
    assert is_boilerplate("".join(chr(ord(c) + 0xFEE0) for c in "IMG_1234"))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_with_a_word_about_the_picture_are_none(caption):
    assert not is_boilerplate(caption)


@pytest.mark.parametrize(
    "date", ["12 May 2008", "May 12, 2008", "2008-05-12", "12/05/08", "May '08", "2008"]
)
@pytest.mark.parametrize("month", ["Jan", "February", "Sept.", "December"])
def test_every_form_of_a_date_with_any_month(date, month):
    date = date.replace("May", month)
    for form in ("photographed on {}", "Photo taken {}.", "{}", "(picture from {}, 14:30)"):
        assert is_boilerplate(form.format(date))
        assert not is_boilerplate(form.format(date) + " lighthouse")


def test_a_long_hostile_caption_takes_no_time_to_speak_of():
    for part in (
        "photo by A" + "." * 9_000,
        "© A" + "-A" * 4_000 + "!",
        "1 " * 5_000,
        "IMG_" * 2_500,
    ):
        is_boilerplate(part)
